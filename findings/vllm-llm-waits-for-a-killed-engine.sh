#!/usr/bin/env bash
# vllm 0.33.0 (PyPI). `LLM` and the server keep the engine in a process of its own. What their callers see when that process is
# killed, as the kernel does when memory is short.
#
# A thread of vLLM's client notices the end within a second, says "engine core exited unexpectedly", marks the engine dead and
# closes what belongs to it. The server's client has its waiting task cancelled, which puts an EngineDeadError into the queue of
# outputs. The client of `LLM` tells its reading thread to end, which it does without putting anything there, while the caller
# waits on that queue without a time limit: `LLM.generate` never returns. (A worker that dies under an engine process that lives
# is another path: that process tells the client, and both raise.) Here a process that says that it is ready and nothing more
# plays the engine, since no GPU is at hand; all else is vLLM's.
#
# Seen on 2026-11-29: as asserted below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.0 numpy==2.4.6
# Without what they depend on, further GPU packages above all: these are what the client imports.
"$folder/venv/bin/pip" install --quiet --no-deps PyYAML==6.0.4 Pygments==2.21.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 \
    aiosignal==1.4.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 apache-tvm-ffi==0.1.15.post2 attrs==26.1.0 \
    cachetools==8.0.2 cbor2==6.3.0 certifi==2026.10.19.post1 charset-normalizer==3.5.3 click==8.5.1 cloudpickle==3.1.3 \
    dill==0.4.1 distro==1.9.0 fastapi==0.136.3 frozenlist==1.8.0 h11==0.16.0 httpcore2==2.16.2 httpx==0.28.1 httpx2==2.16.2 \
    huggingface_hub==2.4.0 idna==3.20 llguidance==1.7.6 msgspec==0.22.0 multidict==7.2.1 openai==2.54.0 \
    opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 orjson==3.13.0 \
    oss-harmony==0.0.11 packaging==26.4 partial-json-parser==0.2.1.1.post7 pillow==13.0.0 prometheus_client==0.26.0 \
    propcache==0.5.4 psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1 pydantic==2.14.4 pydantic-extra-types==2.11.1 \
    pydantic_core==2.50.5 python-multipart==0.0.34 pyzmq==27.3.0 regex==2026.11.19 requests==2.34.2 rich==15.0.0 \
    safetensors==0.8.0 sentencepiece==0.2.3 sniffio==1.3.1 starlette==1.10.0 tiktoken==0.14.0 tokenizers==0.23.3 \
    torchvision==0.29.0 tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typing-inspection==0.4.5 urllib3==2.8.0 \
    uvloop==0.23.0 vllm==0.33.0 xgrammar==0.2.8 yarl==1.25.1 httpcore==1.0.9
VLLM_WORKER_MULTIPROC_METHOD=fork VLLM_NO_USAGE_STATS=1 "$folder/venv/bin/python" - <<'PY'
import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import zmq
from vllm.v1.engine import core_client
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.utils import CoreEngineProcManager


def engine(handshake_address, **_):
    """Says that it is ready; nothing comes from it any more."""
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
    socket.connect(handshake_address)
    socket.send(b"")
    time.sleep(600)


@contextlib.contextmanager
def launch(config, executor, log_stats, addresses):
    manager = CoreEngineProcManager(1, 0, 0, config, True, addresses.inputs[0], executor, log_stats)
    yield SimpleNamespace(engine_manager=manager, coordinator=None, addresses=addresses, tensor_queue=None)


EngineCoreProc.run_engine_core, core_client.launch_core_engines = staticmethod(engine), launch
parallel = SimpleNamespace(
    data_parallel_size=1, data_parallel_index=0, data_parallel_size_local=1, data_parallel_rank_local=0, local_engines_only=False,
    data_parallel_master_ip="127.0.0.1", data_parallel_hybrid_lb=False, data_parallel_external_lb=False, _coord_store_port=0,
    nnodes=1, use_ray=False, assigned_physical_gpu_ids=None, numa_bind=None, enable_elastic_ep=False, enable_fault_tolerance=False,
)
config = SimpleNamespace(
    parallel_config=parallel, model_config=None, cache_config=SimpleNamespace(), shutdown_timeout=0
)


def kill(client):
    [process] = client.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGKILL)


def of_llm():
    client, ends = core_client.SyncMPClient(config, object, False), []

    def wait():
        try:
            client.get_output()
        except Exception as error:
            ends.append(error)

    kill(client)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(20)
    return client.resources.engine_dead, ends


async def of_the_server():
    client = core_client.AsyncMPClient(config, object, False)
    kill(client)
    try:
        return await asyncio.wait_for(client.get_output_async(), 20)
    except Exception as error:
        return error


is_dead, ends = of_llm()
print(f"LLM: the engine is {'dead' if is_dead else 'alive'}, after 20 s the caller {'has ' + repr(ends[0]) if ends else 'still waits'}")
error = asyncio.run(of_the_server())
print("server:", repr(error))
sys.stdout.flush()
os._exit(0 if is_dead and not ends and type(error).__name__ == "EngineDeadError" else 1)
PY
