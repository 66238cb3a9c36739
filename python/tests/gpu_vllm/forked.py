#!/usr/bin/env python3
"""Imports vLLM once for many programs, each of which is forked from there: an import takes 20 s, and more where cores are busy.

  forked.py serve SOCKET           imports, then forks; ends when SOCKET is gone. Says READY, or why it cannot
  forked.py run SOCKET PROGRAM ... PROGRAM with these arguments, this environment, folder and output; exits with its status. Ends it
                                   when it is ended itself
"""

import json
import os
import signal
import socket
import sys
import threading
import time

#: What engines import in any case. None of it may touch the driver: a process that has, cannot be forked.
MODULES = (
    "vllm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.registry",
)


def driver_is_in_use() -> bool:
    """Whether anything in this process has called cuInit."""
    import ctypes

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return library.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != 3  # CUDA_ERROR_NOT_INITIALIZED


def serve(path):
    import importlib

    # vLLM reads it when it is imported.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    start = time.time()
    for module in os.environ.get("FORKED_MODULES", ",".join(MODULES)).split(","):
        importlib.import_module(module)
    if driver_is_in_use():
        sys.exit("forked.py: an import has initialised the driver")
    if threading.active_count() > 1:
        print("forked.py: threads", threading.enumerate(), flush=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path + ".part")
    listener.listen(64)
    os.rename(path + ".part", path)
    listener.settimeout(0.2)
    print(f"READY after {time.time() - start:.1f} s", flush=True)
    clients = {}
    while os.path.exists(path):
        for pid, client in list(clients.items()):
            if client_is_gone(client):
                kill_group(pid)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                report(client, os.waitstatus_to_exitcode(status))
                client.close()
                del clients[pid]
        try:
            client, _ = listener.accept()
        except TimeoutError:
            continue
        request, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
        pid = os.fork()
        if pid == 0:
            listener.close()
            client.close()
            for other in clients.values():
                other.close()
            become(json.loads(request), files)
        for file in files:
            os.close(file)
        clients[pid] = client


def client_is_gone(client) -> bool:
    try:
        return client.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def report(client, status):
    try:
        client.send(json.dumps(status).encode())
    except OSError:
        pass


def become(request, files):
    """The program, in a process group of its own."""
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        if file > 2:
            os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    program, *_ = sys.argv = request["arguments"]
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [os.path.dirname(os.path.abspath(program)), *added, *(entry for entry in sys.path if entry not in added)]
    import importlib
    import runpy

    importlib.invalidate_caches()
    try:
        runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(path, arguments):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(path)
    request = dict(arguments=arguments, environment=dict(os.environ), folder=os.getcwd())
    socket.send_fds(client, [json.dumps(request).encode()], [0, 1, 2])
    status = client.recv(64)
    if not status:
        sys.exit("forked.py: the importing process is gone")
    status = json.loads(status)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        run(sys.argv[2], sys.argv[3:])
