#!/bin/bash
# run.sh smoke|more|tp: vLLM 0.26 with this package on a GPU machine without a network. One folder holds this one, the wheel of
# prefix_attn, and beside it vllm026/ (parts of a reduced vLLM with setup.py and env.sh). Logs and JSON under $OUT/<job>/.
#   smoke  about 5 minutes, one GPU: tokens, step times, profile
#   more   about 4 minutes, one GPU: churn with preemption and aborts, piecewise graphs, another model
#   tp     about 4 minutes, two GPUs: tensor parallel 2, decode context parallel 2
set -u
job=$1
here=$(cd "$(dirname "$0")" && pwd)
parts=${PARTS:-$here/../vllm026}
out=${OUT:-/tmp/out}/vllm-$job
dest=/root/vllm
mkdir -p "$out"
failed=0
python3 "$parts/setup.py" $dest || exit 1
. "$parts/env.sh" $dest
python3 -m zipfile -e "$here"/prefix_attn-*.whl $dest/ours || exit 1
mkdir -p $dest/ours/pat_weights-0.1.dist-info
cp "$here/weights.py" $dest/ours/pat_weights.py
printf 'Metadata-Version: 2.1\nName: pat-weights\nVersion: 0.1\n' > $dest/ours/pat_weights-0.1.dist-info/METADATA
printf '[vllm.general_plugins]\npat_weights = pat_weights:register\n' > $dest/ours/pat_weights-0.1.dist-info/entry_points.txt
export PYTHONPATH=$dest/ours:$PYTHONPATH VLLM_PLUGINS=prefix_attn,pat_weights PREFIX_ATTN_LOG_STEPS=${PREFIX_ATTN_LOG_STEPS:-200}
cd "$here" || exit 1
nvidia-smi -L

drive() { # name, arguments...
    local name=$1
    shift
    timeout "${LIMIT:-170}" python3 drive.py "$out/$name.json" "$@" > "$out/$name.log" 2>&1
    local rc=$?
    echo "== $name: $* (rc $rc)"
    grep -E "^(engine up|metrics|[a-z]+:.* s$)|prefix_attn" "$out/$name.log" | cut -c1-260 | sed 's/^/  /'
    [ $rc = 0 ] || { failed=1; tail -30 "$out/$name.log" | cut -c1-300; }
}
judge() { # title, arguments...
    echo "== $1"
    shift
    python3 compare.py "$@" || { failed=1; echo "  FAILED"; }
}

smoke() {
    local t=tokens:64x1000+77:48
    # Five engines of the small model at a time: 16 cores import vLLM as fast as one does.
    local small="--shape small --kv-gib 4 --seqs 64"
    drive small-fa $small --backend FLASH_ATTN $t $t:16 &
    PREFIX_ATTN_CHECK=1 drive small-ours $small $t $t:16 &
    drive small-graph $small --mode graph --sizes 8,16,64 $t $t:16 &
    drive small-broken $small --break-lengths $t &
    wait
    failed_in_background "$out"/small-{fa,ours,graph,broken}.json
    judge "small, eager, with lengths and tables checked against the device's: as stock?" "$out"/small-fa.json "$out"/small-ours.json $t --self $t:16
    judge "small, eager, 16 at a time: as stock?" "$out"/small-fa.json "$out"/small-ours.json $t:16 --self $t
    judge "small, FULL graphs: as stock?" "$out"/small-fa.json "$out"/small-graph.json $t --self $t:16
    judge "small, one token left out of every row: must be found" "$out"/small-fa.json "$out"/small-broken.json $t --self $t:16 --expect-different
    local t8=tokens:64x1500+100:24 big="--shape 8b --mode graph --seqs 256 --sizes 8,32,64,112,128,256"
    local times="time:64x2496+528:48 time:128x2496+528:40 time:256x2496+528:36 profile:64x2496+528 time:64x0+3000:40 time:112x0+3000:36"
    drive 8b-fa $big --backend FLASH_ATTN $t8 $t8:32 $times
    drive 8b-ours $big $t8 $t8:32 $times
    judge "8B shape, FULL graphs: as stock?" "$out"/8b-fa.json "$out"/8b-ours.json $t8 --self $t8:32
    python3 table.py "$out"/8b-fa.json "$out"/8b-ours.json || failed=1
}

more() {
    local t=tokens:64x1000+77:32 small="--shape small --kv-gib 0.12 --seqs 48 --tokens 1024"
    drive churn-fa $small --backend FLASH_ATTN churn:40:1 churn:40:2 $t $t:16 &
    PREFIX_ATTN_CHECK=1 drive churn-eager $small churn:40:1 $t &
    drive churn-graph $small --mode graph --sizes 1,2,4,8,16,24,32,48 churn:40:1 $t &
    drive churn-piecewise $small --mode piecewise --sizes 8,16,32,48 churn:40:1 $t &
    drive llama-fa $small --model llama --backend FLASH_ATTN $t $t:16 &
    drive llama-graph $small --model llama --mode graph --sizes 8,16,48 $t &
    wait
    failed_in_background "$out"/{churn-fa,churn-eager,churn-graph,churn-piecewise,llama-fa,llama-graph}.json
    for mode in eager graph piecewise; do
        judge "200 requests, $mode: as stock?" "$out"/churn-fa.json "$out"/churn-$mode.json churn:40:1 --self churn:40:2
        judge "64 prompts, $mode: as stock?" "$out"/churn-fa.json "$out"/churn-$mode.json $t --self $t:16
    done
    judge "Llama, FULL graphs: as stock?" "$out"/llama-fa.json "$out"/llama-graph.json $t --self $t:16
}

tp() {
    local t=tokens:64x1000+77:32 small="--shape small --kv-gib 4 --seqs 64"
    drive tp2-fa $small --tp 2 --mode graph --sizes 8,16,64 --backend FLASH_ATTN $t $t:16
    drive tp2-ours $small --tp 2 --mode graph --sizes 8,16,64 $t $t:16
    judge "TP 2, FULL graphs: as stock?" "$out"/tp2-fa.json "$out"/tp2-ours.json $t --self $t:16
    drive dcp2-fa $small --kv-heads 1 --tp 2 --dcp 2 --backend FLASH_ATTN $t $t:16
    drive dcp2-ours $small --kv-heads 1 --tp 2 --dcp 2 $t $t:16
    judge "DCP 2, one KV head, eager: as stock?" "$out"/dcp2-fa.json "$out"/dcp2-ours.json $t --self $t:16
    local times="time:64x2496+528:40 time:256x2496+528:40" big="--shape 8b --tp 2 --mode graph --seqs 256 --sizes 8,64,256"
    drive 8b-tp2-fa $big --backend FLASH_ATTN $times
    drive 8b-tp2-ours $big $times
    python3 table.py "$out"/8b-tp2-fa.json "$out"/8b-tp2-ours.json || failed=1
}

failed_in_background() { # a drive in the background cannot set `failed`
    for file; do [ -s "$file" ] || failed=1; done
}

$job
[ $failed = 0 ] && echo "== $job: ALL GOOD" || echo "== $job: SOMETHING FAILED"
exit $failed
