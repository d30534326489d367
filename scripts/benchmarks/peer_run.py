"""One peer, run by the interpreter that has it: `peer_run.py NAME SECONDS` prints one JSON line. Imports nothing of ours."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np

X = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
IN_FLIGHT = 64
MOSEC = """
import numpy as np
from mosec import Server, Worker
class Affine(Worker):
    def deserialize(self, data): return np.frombuffer(data, np.float32)
    def serialize(self, data): return data.tobytes()
    def forward(self, data): return list(np.stack(data) * 2 + 1)
if __name__ == "__main__":
    server = Server()
    server.append_worker(Affine, num=1, max_batch_size=32, max_wait_time=5)
    server.run()
"""
LITSERVE = """
import numpy as np, litserve as ls
class Affine(ls.LitAPI):
    def setup(self, device): pass
    def decode_request(self, request): return np.asarray(request["x"], np.float32)
    def batch(self, xs): return np.stack(xs)
    def predict(self, x): return x * 2 + 1
    def unbatch(self, y): return list(y)
    def encode_response(self, output): return {"y": output.tolist()}
if __name__ == "__main__":
    api = Affine(max_batch_size=32, batch_timeout=0.005)
    ls.LitServer(api, accelerator="cpu").run(port=PORT, generate_client_file=False, log_level="error")
"""


def report(name: str, rate: float, times: list[float]) -> None:
    times = sorted(times)
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    print(json.dumps({"peer": name, "tasks_per_s": rate, "p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99}))


async def http_load(
    port: int, path: str, content_type: str, body: bytes, connections: int, seconds: float
) -> tuple[float, list[float]]:
    """Posts over kept-alive connections; (requests/s, seconds of each)."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    request, times = head.encode() + body, list[float]()
    end = time.perf_counter() + seconds

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            started = time.perf_counter()
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in answer[:16]:
                raise SystemExit(answer[:80])
            fields = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:] if b": " in line)
            await reader.readexactly(int(fields[b"content-length"]))
            times.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(connections)))
    return len(times) / (time.perf_counter() - started), times


def served(
    name: str, source: str, args: list[str], port: int, path: str, content_type: str, body: bytes, seconds: float
) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as f:
        f.write(source.replace("PORT", str(port)))
        f.flush()
        p = subprocess.Popen([sys.executable, f.name, *args], stdout=2, start_new_session=True)
        try:
            wait_for(port)
            asyncio.run(http_load(port, path, content_type, body, IN_FLIGHT, 1.0))
            rate, _ = asyncio.run(http_load(port, path, content_type, body, IN_FLIGHT, seconds))
            _, times = asyncio.run(http_load(port, path, content_type, body, 1, seconds))
            report(name, rate, times)
        finally:
            os.killpg(p.pid, signal.SIGTERM)
            p.wait(10)


def wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def pooled(name: str, burst: Callable[[int], None], one: Callable[[], object], count: int) -> None:
    """For systems with futures: a burst, then one at a time."""
    burst(200)
    started = time.perf_counter()
    burst(count)
    rate, times = count / (time.perf_counter() - started), list[float]()
    for _ in range(300):
        started = time.perf_counter()
        one()
        times.append(time.perf_counter() - started)
    report(name, rate, times)


def affine(x: np.ndarray, number: int = 0) -> np.ndarray:
    return x * 2 + 1


def main(name: str, seconds: float) -> None:
    if name == "mosec":
        served(name, MOSEC, ["--port", "18801"], 18801, "/inference", "application/octet-stream", X.tobytes(), seconds)
    elif name == "litserve":
        body = json.dumps({"x": X.tolist()}).encode()
        served(name, LITSERVE, [], 18802, "/predict", "application/json", body, seconds)
    elif name == "ProcessPoolExecutor":
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(1) as pool:
            pooled(name, lambda n: [f.result() for f in [pool.submit(affine, X) for _ in range(n)]] and None,
                   lambda: pool.submit(affine, X).result(), 10_000)  # fmt: skip
    elif name == "ipyparallel":
        import ipyparallel

        with ipyparallel.Cluster(n=1, log_level=40) as cluster:
            view = cluster.load_balanced_view()
            pooled(name, lambda n: [r.get() for r in [view.apply_async(affine, X) for _ in range(n)]] and None,
                   lambda: view.apply_async(affine, X).get(), 1000)  # fmt: skip
    elif name == "dask":
        from distributed import Client, LocalCluster

        with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
            pooled(name, lambda n: client.gather([client.submit(affine, X, i, pure=False) for i in range(n)]) and None,
                   lambda: client.submit(affine, X, pure=False).result(), 2000)  # fmt: skip
    else:
        raise SystemExit(f"no peer {name}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
