"""Seeds that once broke a promise. They are run for good: a test replays each of them.

What a seed does changes with the simulation, so `kept` names what it was that failed, not what it does today; the product's own
tests hold each of these by itself.
"""

KEPT = (
    (2, "a worker that left politely, interrupted twice: a row that must not run twice ran again"),
    (6, "a second submission with the key heard of the outcome before it was on disk"),
    (54, "the same, of a row that ended as worker_lost"),
    (80, "a second submission with the key of a task that waits for its kernel was refused as unknown_kernel"),
    (373, "the last row of a batch whose others had ended was blamed as if it had run alone"),
    (459, "a task came back to its client past the client's window: the invariant was wrong"),
    (599, "outcomes of a fetch whose reply was lost were acknowledged before anybody had them"),
    (634, "the record of an attempt was lost in a crash of the broker: a row that must not run twice ran again"),
    (212, "a fetch after a reconnect was refused for want of credit, and the user told so of a task that was accepted"),
    (1135, "a task that was not durable came as something new to a broker that had forgotten it: the invariant was wrong"),
    (2982, "an attach acknowledged outcomes that nobody had yet"),
    (4858, "messages found a full pipe and those behind them did not: the client gave up what was missing after asking once"),
    (6610, "the same: tasks stayed open for ever"),
    (12979, "the same: outcomes that were never seen were acknowledged"),
    (28103, "the session of a client that stood still ended, and a twin of its task started anew: the invariant was wrong"),
    (80224, "what an earlier broker had refused came as something new to the next one: the invariant was wrong"),
    (99263, "the same"),
)
"""(seed, why)."""
