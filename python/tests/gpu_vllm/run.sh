#!/bin/bash
# run.sh JOB: vLLM 0.26 with this package on a GPU machine without a network. One folder holds this one, the wheel of prefix_attn,
# and beside it vllm026/ (parts of a reduced vLLM with setup.py and env.sh). Logs and JSON under $OUT/vllm-JOB/.
#   smoke   2 minutes, one GPU: tokens of a small model, eager and in FULL graphs
#   big     3 minutes, one GPU: step times of the 8B shape, profile
#   idle    1.5 minutes, one GPU: how long the device waits for the host in steps of the 8B shape, two engines in turn
#   exact   2 minutes, one GPU: FULL graphs beside float32 attention: the 8B shape layer by layer and by log-probs; small models with
#           drafts and with gpt-oss's attention layer by layer
#   modes   2 minutes, one GPU, 100 GB: the 8B shape eager, in PIECEWISE graphs and in both: log-probs beside float32, tokens
#   tokens  2 minutes, one GPU: tokens of a small model in PIECEWISE graphs; an engine that is restarted
#   faults  2 minutes, one GPU: no memory, plans larger than their capacity, restarts in the middle
#   killed  1.5 minutes, one GPU: the engine's process is killed behind the server's front end; a new engine
#   drafts  2.5 minutes, one GPU: speculative decoding with 3 drafts: tokens, step times of the 8B shape
#   compiled 2 minutes, one GPU: vLLM's default mode (compiler, FULL_AND_PIECEWISE graphs), as serving is measured: tokens of the
#           8B shape, 200 requests of a small model whose prompts come beside others' decode rows
#   more    2 minutes, one GPU: 200 requests with preemption and aborts: Qwen3, Llama, gpt-oss's attention (MODELS)
#   gpt_oss 1.5 minutes, one GPU: windows and sinks: layers beside float32, tokens, 200 requests
#   gpt_oss_times, gpt_oss_apart  1.5 minutes, one GPU: step times of gpt-oss-20b's attention, two engines in turn; Python's time
#   fp8     2.5 minutes, one GPU: FP8 KV: layers beside float32, log-probs, tokens, step times of the 8B shape (NO_TIMES=1: without)
#   shapes  2.5 minutes, one GPU: 2, 3 and 5 query tokens a row; head dim 256 with soft cap and windows: layers, tokens, step times
#   ranks   2 minutes, two GPUs: data parallel 2, decode context parallel 2 in graphs
#   tp_tokens 1.5 minutes, two GPUs: tensor parallel and decode context parallel, eager and in graphs: tokens alone
#   tp      3 minutes, TP GPUs (2, or 4): tensor parallel, decode context parallel 2, step times of the 8B shape, a killed worker
set -u
job=$1
here=$(cd "$(dirname "$0")" && pwd)
parts=${PARTS:-$here/../vllm026}
out=${OUT:-/tmp/out}/vllm-$job
dest=${DEST:-/root/vllm}
mkdir -p "$out"
failed=0
flock /tmp/vllm-setup.lock python3 "$parts/setup.py" $dest || exit 1
. "$parts/env.sh" $dest
# Each run has its own: several may run at a time.
ours=$(mktemp -d)
python3 -m zipfile -e "$here"/prefix_attn-*.whl "$ours" || exit 1
mkdir -p "$ours"/pat_weights-0.1.dist-info
cp "$here/weights.py" "$ours"/pat_weights.py
printf 'Metadata-Version: 2.1\nName: pat-weights\nVersion: 0.1\n' > "$ours"/pat_weights-0.1.dist-info/METADATA
printf '[vllm.general_plugins]\npat_weights = pat_weights:register\n' > "$ours"/pat_weights-0.1.dist-info/entry_points.txt
# Windows of any length are served.
export PREFIX_ATTN_MIN_WINDOW=1
export PYTHONPATH=$ours:$PYTHONPATH VLLM_PLUGINS=prefix_attn,pat_weights PREFIX_ATTN_LOG_STEPS=${PREFIX_ATTN_LOG_STEPS:-200}
cd "$here" || exit 1
nvidia-smi -L

drive() { # name, arguments...
    local name=$1
    shift
    # IMPORTED: socket of a `forked.py serve`, which has imported vLLM already.
    timeout "${LIMIT:-170}" python3 ${IMPORTED:+forked.py run "$IMPORTED"} "${PROGRAM:-drive.py}" "$out/$name.json" "$@" \
        > "$out/$name.log" 2>&1
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

exactness() { # title, arguments...
    echo "== $1"
    shift
    python3 exactness.py "$@" || { failed=1; echo "  FAILED"; }
}

smoke() {
    local t=tokens:64x1000+77:48
    # Engines of the small model at a time: 16 cores import vLLM as fast as one does.
    local small="--shape small --kv-gib 4 --seqs 64"
    drive small-fa $small --backend FLASH_ATTN $t $t:16 &
    drive small-triton $small --backend TRITON_ATTN $t &
    PREFIX_ATTN_CHECK=1 drive small-ours $small $t $t:16 broken:${t#*:} &
    drive small-graph $small --mode graph --sizes 8,16,64 $t $t:16 &
    wait
    failed_in_background "$out"/small-{fa,triton,ours,graph}.json
    local noise="--noise $out/small-triton.json $t --noise $out/small-fa.json $t:16"
    judge "small, eager, with lengths and tables checked against the device's: as stock?" \
        "$out"/small-fa.json "$out"/small-ours.json $t $noise
    judge "small, eager, 16 at a time: as stock?" \
        "$out"/small-fa.json "$out"/small-ours.json $t:16 --noise "$out"/small-fa.json $t
    judge "small, FULL graphs: as stock?" "$out"/small-fa.json "$out"/small-graph.json $t $noise
    judge "small, one token left out of every row: must be found" "$out"/small-fa.json "$out"/small-ours.json $t $noise \
        --task-of-ours broken:${t#*:} --expect-different
}

big() {
    local big="--shape 8b --mode graph --seqs 256 --sizes 8,32,64,112,128,256"
    local times="time:64x2496+528:48 time:128x2496+528:40 time:256x2496+528:36 profile:64x2496+528 profile:256x2496+528"
    times="$times time:64x0+3000:40 time:112x0+3000:80"
    drive 8b-fa $big --backend FLASH_ATTN $times
    drive 8b-ours $big $times
    python3 table.py "$out"/8b-fa.json "$out"/8b-ours.json || failed=1
}

idle() {
    local big="--shape 8b --mode graph --kv-gib 24 --seqs 256 --sizes 64,256"
    in_turn idle "$big" time:64x2496+528:40 profile:64x2496+{528,529,530} profile:256x2496+528
}

exact() {
    local t=64x1500+100:24 s=64x1000+77:32
    local small="--shape small --kv-gib 1 --seqs 64 --tokens 4096 --max-len 2048" known="--drafts 3 --known $out/plain-fa.json"
    local big="--shape 8b --mode graph --kv-gib 2.5 --seqs 64 --tokens 4096 --max-len 2048 --sizes 64"
    # All at a time: three engines of the 8B shape take 60 GB.
    drive exact $big --compare layers:$t layers:$t:broken forced:$t:{ours,stock,float32,broken} tokens:$t broken:$t &
    drive exact-fa $big --backend FLASH_ATTN forced:$t:engine tokens:$t tokens:$t:32 &
    drive exact-triton $big --backend TRITON_ATTN forced:$t:engine tokens:$t &
    rm -f "$out"/plain-fa.json
    drive plain-fa $small --backend FLASH_ATTN tokens:$s &
    drive drafts-exact $small $known --mode graph --sizes 256 --compare layers:$s layers:$s:broken &
    drive gpt-oss-exact $small --model gpt-oss --mode graph --sizes 64 --compare layers:$s layers:$s:broken &
    wait
    failed_in_background "$out"/{exact,exact-fa,exact-triton,plain-fa,drafts-exact,gpt-oss-exact}.json
    for what in drafts gpt-oss; do
        exactness "small, $what, FULL graphs, each layer: as near to float32 attention as stock?" \
            layers "$out"/$what-exact.json layers:$s
        exactness "small, $what, each layer, one token left out of every row: must be found" \
            layers "$out"/$what-exact.json layers:$s:broken --expect-different
    done
    local forced="--exact forced:$t:float32 --stock forced:$t:stock"
    for backend in fa triton; do forced="$forced --also $out/exact-$backend.json forced:$t:engine"; done
    exactness "8B shape, FULL graphs, each layer: as near to float32 attention as stock?" layers "$out"/exact.json layers:$t
    exactness "8B shape, each layer, one token left out of every row: must be found" \
        layers "$out"/exact.json layers:$t:broken --expect-different
    exactness "8B shape, log-probs of given tokens: as near to float32 attention as stock?" \
        scores "$out"/exact.json forced:$t:ours $forced
    exactness "8B shape, log-probs, one token left out of every row: must be found" \
        scores "$out"/exact.json forced:$t:broken $forced --expect-different
    local noise="--noise $out/exact-triton.json tokens:$t --noise $out/exact-fa.json tokens:$t:32"
    judge "8B shape, greedy tokens: as stock?" "$out"/exact-fa.json "$out"/exact.json tokens:$t $noise
    judge "8B shape, greedy tokens, one token left out of every row: must be found" \
        "$out"/exact-fa.json "$out"/exact.json tokens:$t $noise --task-of-ours broken:$t --expect-different
    rm "$out"/*.pt
}

modes() {
    local t=64x1500+100:16 mode
    local big="--shape 8b --kv-gib 2.5 --seqs 64 --tokens 4096 --max-len 2048 --sizes 8,64 --no-inductor"
    for mode in eager piecewise; do
        drive 8b-$mode $big --mode $mode forced:$t:{ours,stock,float32,broken} {tokens,float32,broken}:$t &
        drive 8b-$mode-fa $big --mode $mode --backend FLASH_ATTN tokens:$t tokens:$t:32 &
    done
    drive 8b-both $big --mode both tokens:$t &
    wait
    failed_in_background "$out"/8b-{eager,piecewise}{,-fa}.json "$out"/8b-both.json
    for mode in eager piecewise; do
        local forced="--exact forced:$t:float32 --stock forced:$t:stock"
        exactness "8B shape, $mode, log-probs of given tokens: as near to float32 attention as stock?" \
            scores "$out"/8b-$mode.json forced:$t:ours $forced
        exactness "8B shape, $mode, log-probs, one token left out of every row: must be found" \
            scores "$out"/8b-$mode.json forced:$t:broken $forced --expect-different
        local noise="--noise $out/8b-$mode.json float32:$t --noise $out/8b-$mode-fa.json tokens:$t:32"
        judge "8B shape, $mode, greedy tokens: as stock?" "$out"/8b-$mode-fa.json "$out"/8b-$mode.json tokens:$t $noise
        judge "8B shape, $mode, greedy tokens, one token left out of every row: must be found" \
            "$out"/8b-$mode-fa.json "$out"/8b-$mode.json tokens:$t $noise --task-of-ours broken:$t --expect-different
    done
    judge "8B shape, FULL_AND_PIECEWISE, greedy tokens: as stock in PIECEWISE graphs?" \
        "$out"/8b-piecewise-fa.json "$out"/8b-both.json tokens:$t $noise
    rm -f "$out"/*.pt
}

tokens() {
    local t=tokens:64x1000+77:32
    local piecewise="--shape small --mode piecewise --kv-gib 0.7 --seqs 64 --tokens 4096 --sizes 8,16,64"
    local eager="--shape small --kv-gib 0.7 --seqs 64 --tokens 4096"
    drive piecewise-fa $piecewise --backend FLASH_ATTN $t $t:16 &
    drive piecewise-triton $piecewise --backend TRITON_ATTN $t &
    drive piecewise-ours $piecewise $t broken:${t#*:} &
    drive eager-fa $eager --backend FLASH_ATTN $t $t:16 &
    drive eager-restarts $eager $t restart:5x100+20 again:${t#*:} &
    wait
    failed_in_background "$out"/piecewise-{fa,triton,ours}.json "$out"/eager-{fa,restarts}.json
    local noise="--noise $out/piecewise-triton.json $t --noise $out/piecewise-fa.json $t:16"
    judge "small, PIECEWISE graphs: as stock in PIECEWISE graphs?" "$out"/piecewise-fa.json "$out"/piecewise-ours.json $t $noise
    judge "small, PIECEWISE, one token left out of every row: must be found" \
        "$out"/piecewise-fa.json "$out"/piecewise-ours.json $t $noise --task-of-ours broken:${t#*:} --expect-different
    judge "small, eager, behind a restart in the middle: as stock?" \
        "$out"/eager-fa.json "$out"/eager-restarts.json $t --task-of-ours again:${t#*:} --noise "$out"/eager-fa.json $t:16
}

faults() {
    local t=32x600+77:24 fault=32x600+77:16 how engine
    local small="--shape small --kv-gib 1 --seqs 32 --tokens 4096 --max-len 2048" graph="--mode graph --sizes 8,32"
    declare -A faults=([eager]="memory rows" [graph]="plan upload")
    # Some of them alone: FAULTS="memory upload".
    for engine in ${!faults[@]}; do
        faults[$engine]=$(for how in ${faults[$engine]}; do [[ " ${FAULTS:-$how} " != *" $how "* ]] || echo $how; done)
    done
    drive faults-fa $small --backend FLASH_ATTN tokens:$t tokens:$t:8 &
    drive faults-triton $small --backend TRITON_ATTN tokens:$t &
    for engine in eager graph; do
        drive faults-$engine $small --apart $([ $engine = eager ] || echo $graph) \
            $(for how in ${faults[$engine]}; do echo fail:$how:$fault restart:; done) \
            $([ $engine != eager ] || echo restart:5x100+20) again:$t &
    done
    wait
    failed_in_background "$out"/faults-{fa,triton,eager,graph}.json
    local noise="--noise $out/faults-triton.json tokens:$t --noise $out/faults-fa.json tokens:$t:8"
    for engine in eager graph; do
        for how in ${faults[$engine]}; do
            judge "$how, $engine: what came before it as stock?" "$out"/faults-fa.json "$out"/faults-$engine.json tokens:$t $noise \
                --task-of-ours fail:$how:$fault
            said "$out"/faults-$engine $how
        done
        judge "$engine, behind faults and restarts: as stock?" "$out"/faults-fa.json "$out"/faults-$engine.json tokens:$t $noise \
            --task-of-ours again:$t
    done
}

killed() {
    local t=32x600+77:24 fault=32x600+77:16
    local small="--ranks 1 --shape small --kv-gib 1 --seqs 32 --tokens 4096 --max-len 2048 --mode graph --sizes 8,32"
    # As vLLM starts engines unless told otherwise: their processes need not import it once more.
    local -x PROGRAM=parallel.py VLLM_WORKER_MULTIPROC_METHOD=${VLLM_WORKER_MULTIPROC_METHOD:-fork} LIMIT=${LIMIT:-90}
    drive killed-fa $small --backend FLASH_ATTN tokens:$t tokens:$t:8 fail:kill:$fault &
    drive killed-ours $small tokens:$t fail:kill:$fault restart: again:$t &
    wait
    failed_in_background "$out"/killed-{fa,ours}.json
    local noise="--noise $out/killed-fa.json tokens:$t:8"
    judge "killed: what came before it as stock?" "$out"/killed-fa.json "$out"/killed-ours.json tokens:$t $noise \
        --task-of-ours fail:kill:$fault
    judge "killed: a new engine behind it as stock?" "$out"/killed-fa.json "$out"/killed-ours.json tokens:$t $noise \
        --task-of-ours again:$t
    said "$out"/killed-fa kill
    said "$out"/killed-ours kill
}

said() { # record and log, what happened: the engine's log has our error
    python3 - "$@" << 'EOF' || failed=1
import json, sys

faults = [task for task in json.load(open(sys.argv[1] + ".json"))["tasks"].values() if task.get("fault") == sys.argv[2]]
log = open(sys.argv[1] + ".log").read()
for fault in faults:
    print("   after %.1f s: %s" % (fault["seconds"], fault["error"][:120]))
sys.exit(not faults or any(fault["words"] not in log for fault in faults))
EOF
}

one_by_one() { # "engines that run beside each other", stock, ours: the last two wait for a file each, so that neither is disturbed
    wait $1
    touch "$out"/go-fa
    wait $2
    touch "$out"/go-ours
    wait $3
    rm -f "$out"/go-*
}

drafts() {
    local t=64x1000+77:48
    local small="--shape small --kv-gib 1 --seqs 64 --tokens 4096 --max-len 2048"
    local known="--drafts 3 --known $out/plain-fa.json"
    local big="--shape 8b --mode graph --kv-gib 12 --seqs 128 --tokens 8192 --drafts 3 --sizes 256,512"
    local times="time:64x2496+528:40 time:128x2496+528:40"
    rm -f "$out"/go-* "$out"/plain-fa.json
    drive plain-fa $small --backend FLASH_ATTN tokens:$t tokens:$t:16 & local engines=$!
    drive drafts-fa $small $known --backend FLASH_ATTN tokens:$t & engines="$engines $!"
    PREFIX_ATTN_CHECK=1 drive drafts-eager $small $known tokens:$t & engines="$engines $!"
    drive drafts-graph $small $known --mode graph --sizes 64,256 tokens:$t broken:$t & engines="$engines $!"
    drive 8b-drafts-fa $big --wait "$out"/go-fa --backend FLASH_ATTN $times & local stock=$!
    drive 8b-drafts-ours $big --wait "$out"/go-ours $times & local ours=$!
    one_by_one "$engines" $stock $ours
    failed_in_background "$out"/{plain-fa,drafts-fa,drafts-eager,drafts-graph,8b-drafts-fa,8b-drafts-ours}.json
    local noise="--noise $out/drafts-fa.json tokens:$t --noise $out/plain-fa.json tokens:$t:16"
    for mode in eager graph; do
        judge "small, 3 drafts, $mode: as stock without drafts?" "$out"/plain-fa.json "$out"/drafts-$mode.json tokens:$t $noise
    done
    judge "small, 3 drafts, one token left out of every row: must be found" "$out"/plain-fa.json "$out"/drafts-graph.json \
        tokens:$t $noise --task-of-ours broken:$t --expect-different
    python3 table.py "$out"/8b-drafts-fa.json "$out"/8b-drafts-ours.json || failed=1
}

churn=churn:40:1

start_churn() { # model
    # As many tokens as make some requests wait and others go.
    local small="--shape small --model $1 --seqs 48 --tokens 1024 --max-len 4096 --kv-gib 0.12"
    [ $1 != gpt-oss ] || small="$small --kv-gib 0.016"
    drive $1-churn-fa $small --backend FLASH_ATTN $churn churn:40:2 & engines="$engines $!"
    drive $1-churn-triton $small --backend TRITON_ATTN $churn & engines="$engines $!"
    PREFIX_ATTN_CHECK=1 drive $1-churn-eager $small $churn & engines="$engines $!"
    drive $1-churn-graph $small --mode graph --sizes 1,2,4,8,16,24,32,48 $churn & engines="$engines $!"
}

judge_churn() { # model
    failed_in_background "$out"/$1-churn-{fa,triton,eager,graph}.json
    for mode in eager graph; do
        judge "200 requests, $1, $mode: as stock?" "$out"/$1-churn-fa.json "$out"/$1-churn-$mode.json $churn \
            --noise "$out"/$1-churn-fa.json churn:40:2 --noise "$out"/$1-churn-triton.json $churn
        everything_happened "$out"/$1-churn-$mode.json $churn
        logged "$out"/$1-churn-$mode.log
    done
}

more() {
    local engines=""
    for model in ${MODELS:-qwen3 llama gpt-oss}; do start_churn $model; done
    local small="--shape small --seqs 48 --tokens 1024 --kv-gib 0.12 --mode piecewise --sizes 8,16,32,48"
    drive piecewise-fa $small --backend FLASH_ATTN $churn churn:40:2 &
    drive piecewise-triton $small --backend TRITON_ATTN $churn &
    drive piecewise-ours $small $churn &
    wait
    for model in ${MODELS:-qwen3 llama gpt-oss}; do judge_churn $model; done
    failed_in_background "$out"/piecewise-{fa,triton,ours}.json
    judge "200 requests, PIECEWISE graphs: as stock in PIECEWISE graphs?" "$out"/piecewise-fa.json "$out"/piecewise-ours.json $churn \
        --noise "$out"/piecewise-fa.json churn:40:2 --noise "$out"/piecewise-triton.json $churn
}

compiled() {
    local t=tokens:32x1500+100:32
    # Graphs of all steps up to the token budget: those that mix prompts and decode rows, too.
    local sizes=64,128,256,512,1024
    local big="--shape 8b --mode both --kv-gib 2.5 --seqs 32 --tokens 2048 --max-len 2048 --sizes 8,16,32,$sizes,2048"
    local small="--shape small --mode both --kv-gib 0.12 --seqs 48 --tokens 1024 --sizes 8,16,32,48,$sizes"
    drive compiled-8b-fa $big --backend FLASH_ATTN $t $t:8 &
    drive compiled-8b-triton $big --backend TRITON_ATTN $t &
    drive compiled-8b-ours $big $t broken:${t#*:} &
    drive compiled-fa $small --backend FLASH_ATTN $churn churn:40:2 &
    drive compiled-triton $small --backend TRITON_ATTN $churn &
    drive compiled-ours $small $churn &
    wait
    failed_in_background "$out"/compiled-{8b-fa,8b-triton,8b-ours,fa,triton,ours}.json
    local noise="--noise $out/compiled-8b-triton.json $t --noise $out/compiled-8b-fa.json $t:8"
    judge "8B shape, FULL_AND_PIECEWISE: as stock in the same mode?" \
        "$out"/compiled-8b-fa.json "$out"/compiled-8b-ours.json $t $noise
    judge "8B shape, FULL_AND_PIECEWISE, one token left out of every row: must be found" \
        "$out"/compiled-8b-fa.json "$out"/compiled-8b-ours.json $t $noise --task-of-ours broken:${t#*:} --expect-different
    judge "200 requests, FULL_AND_PIECEWISE: as stock in the same mode?" \
        "$out"/compiled-fa.json "$out"/compiled-ours.json $churn \
        --noise "$out"/compiled-fa.json churn:40:2 --noise "$out"/compiled-triton.json $churn
}

gpt_oss() {
    local t=64x1000+77:32 engines=""
    local small="--shape small --model gpt-oss --kv-gib 0.5 --seqs 64 --tokens 4096 --max-len 2048"
    drive gpt-oss-fa $small --backend FLASH_ATTN tokens:$t tokens:$t:16 &
    drive gpt-oss-triton $small --backend TRITON_ATTN tokens:$t &
    drive gpt-oss-graph $small --mode graph --sizes 64 --compare layers:$t layers:$t:broken {tokens,broken}:$t &
    start_churn gpt-oss
    wait
    failed_in_background "$out"/gpt-oss-{fa,triton,graph}.json
    exactness "gpt-oss's attention with windows, FULL graphs, each layer: as near to float32 attention as stock?" \
        layers "$out"/gpt-oss-graph.json layers:$t
    exactness "gpt-oss's attention, each layer, one token left out of every row: must be found" \
        layers "$out"/gpt-oss-graph.json layers:$t:broken --expect-different
    local noise="--noise $out/gpt-oss-triton.json tokens:$t --noise $out/gpt-oss-fa.json tokens:$t:16"
    judge "gpt-oss's attention, FULL graphs: as stock?" "$out"/gpt-oss-fa.json "$out"/gpt-oss-graph.json tokens:$t $noise
    judge "gpt-oss's attention, one token left out of every row: must be found" \
        "$out"/gpt-oss-fa.json "$out"/gpt-oss-graph.json tokens:$t $noise --task-of-ours broken:$t --expect-different
    judge_churn gpt-oss
}

oss="--shape oss --model gpt-oss --mode graph --kv-gib 6 --seqs 256 --sizes 8,64,256"

gpt_oss_times() {
    local once="time:64x2496+528:40 time:256x2496+528:40" again="time:64x2496+528:41 time:256x2496+528:41"
    in_turn oss "$oss" $once $again {profile,host}:{64,256}x2496+528
}

gpt_oss_apart() { # the engine in a process of its own, as in a server
    in_turn oss-apart "$oss --apart" time:64x2496+528:40 time:256x2496+528:40
}

in_turn() { # name, arguments of both engines, tasks: stock does one, then ours
    local name=$1 both="$2 --wait $out/go-$1"
    shift 2
    rm -f "$out"/go-* "$out"/turn-*
    drive $name-fa $both --turns "$out"/turn-{fa,ours} 0 --backend FLASH_ATTN "$@" & local stock=$!
    drive $name-ours $both --turns "$out"/turn-{ours,fa} 1 "$@" & local ours=$!
    # An engine that is being made disturbs those that measure.
    until_up $name-fa
    until_up $name-ours
    touch "$out"/go-$name
    wait $stock $ours
    rm -f "$out"/go-*
    failed_in_background "$out"/$name-{fa,ours}.json
    python3 table.py "$out"/$name-fa.json "$out"/$name-ours.json || failed=1
}

until_up() { # name: an engine has been made, or has failed
    local seconds
    for seconds in $(seq 120); do
        grep -qE "^engine up|^Traceback" "$out/$1.log" 2> /dev/null && return
        sleep 1
    done
}

fp8() {
    local t=64x1500+100:24 engines=""
    local mid="--shape 1.7b --kv-dtype fp8 --mode graph --kv-gib 2 --seqs 64 --tokens 4096 --max-len 2048 --sizes 64"
    local big="--shape 8b --kv-dtype fp8 --mode graph --kv-gib 12 --seqs 256 --sizes 8,64,128,256"
    local times="time:64x2496+528:40 time:128x2496+528:40 time:256x2496+528:36 time:64x0+2000:40 profile:64x2496+528"
    rm -f "$out"/go-*
    drive fp8-ours $mid --compare layers:$t layers:$t:broken forced:$t:{ours,stock,float32,broken} {tokens,float32,broken}:$t & engines=$!
    drive fp8-fa $mid --backend FLASH_ATTN forced:$t:engine tokens:$t tokens:$t:32 & engines="$engines $!"
    drive fp8-eager ${mid/--mode graph/} tokens:$t & engines="$engines $!"
    if [ -n "${NO_TIMES:-}" ]; then
        wait $engines
    else
        drive 8b-fp8-fa $big --wait "$out"/go-fa --backend FLASH_ATTN $times & local stock=$!
        drive 8b-fp8-ours $big --wait "$out"/go-ours $times & local ours=$!
        one_by_one "$engines" $stock $ours
        failed_in_background "$out"/8b-fp8-{fa,ours}.json
    fi
    failed_in_background "$out"/fp8-{ours,fa,eager}.json
    exactness "FP8 KV, 1.7B shape, FULL graphs, each layer: as near to float32 attention over the FP8 cache as with 16 bits?" \
        layers "$out"/fp8-ours.json layers:$t --at-most 3e-3
    exactness "FP8 KV, each layer, one token left out of every row: must be found" \
        layers "$out"/fp8-ours.json layers:$t:broken --expect-different
    local forced="--exact forced:$t:float32 --stock forced:$t:stock --also $out/fp8-fa.json forced:$t:engine"
    exactness "FP8 KV, log-probs of given tokens: as near to float32 attention as stock?" \
        scores "$out"/fp8-ours.json forced:$t:ours $forced
    exactness "FP8 KV, log-probs, one token left out of every row: must be found" \
        scores "$out"/fp8-ours.json forced:$t:broken $forced --expect-different
    # FlashAttention rounds queries to FP8: that is noise, too.
    local noise="--noise $out/fp8-ours.json float32:$t --noise $out/fp8-fa.json tokens:$t:32"
    for engine in ours eager; do
        judge "FP8 KV, greedy tokens, $engine: as stock?" "$out"/fp8-fa.json "$out"/fp8-$engine.json tokens:$t $noise
    done
    judge "FP8 KV, greedy tokens, one token left out of every row: must be found" \
        "$out"/fp8-fa.json "$out"/fp8-ours.json tokens:$t $noise --task-of-ours broken:$t --expect-different
    rm -f "$out"/*.pt
    [ -n "${NO_TIMES:-}" ] || python3 table.py "$out"/8b-fp8-fa.json "$out"/8b-fp8-ours.json || failed=1
}

shapes() {
    local t=64x1000+77:32 engines="" count
    local small="--shape small --kv-gib 0.5 --seqs 64 --tokens 4096 --max-len 2048"
    local big="--shape gemma --model gemma --mode graph --kv-gib 13 --seqs 128 --sizes 8,64,128"
    local times="time:64x2496+528:40 time:128x2496+528:40 profile:64x2496+528"
    rm -f "$out"/go-* "$out"/plain-fa.json
    drive plain-fa $small --backend FLASH_ATTN tokens:$t tokens:$t:16 & engines=$!
    drive drafts-fa $small --drafts 4 --known "$out"/plain-fa.json --backend FLASH_ATTN tokens:$t & engines="$engines $!"
    for count in 1 2 4; do
        drive drafts-$count $small --drafts $count --known "$out"/plain-fa.json --mode graph --sizes $((64 * (count + 1))) \
            --compare layers:$t layers:$t:broken {tokens,broken}:$t & engines="$engines $!"
    done
    small="$small --model gemma --kv-gib 1"
    drive gemma-fa $small --backend FLASH_ATTN tokens:$t tokens:$t:16 & engines="$engines $!"
    drive gemma-triton $small --backend TRITON_ATTN tokens:$t & engines="$engines $!"
    drive gemma-ours $small --mode graph --sizes 64 --compare layers:$t layers:$t:broken {tokens,broken}:$t & engines="$engines $!"
    drive gemma-big-fa $big --wait "$out"/go-fa --backend FLASH_ATTN $times & local stock=$!
    drive gemma-big-ours $big --wait "$out"/go-ours $times & local ours=$!
    one_by_one "$engines" $stock $ours
    failed_in_background "$out"/{plain-fa,drafts-fa,drafts-1,drafts-2,drafts-4,gemma-fa,gemma-triton,gemma-ours,gemma-big-fa,gemma-big-ours}.json
    for what in drafts-1 drafts-2 drafts-4 gemma-ours; do
        local stock_record=plain-fa noise="--noise $out/drafts-fa.json tokens:$t --noise $out/plain-fa.json tokens:$t:16"
        if [ $what = gemma-ours ]; then
            stock_record=gemma-fa noise="--noise $out/gemma-triton.json tokens:$t --noise $out/gemma-fa.json tokens:$t:16"
        fi
        exactness "$what, FULL graphs, each layer: as near to float32 attention as stock?" layers "$out"/$what.json layers:$t
        exactness "$what, each layer, one token left out of every row: must be found" \
            layers "$out"/$what.json layers:$t:broken --expect-different
        judge "$what, FULL graphs: as stock?" "$out"/$stock_record.json "$out"/$what.json tokens:$t $noise
        judge "$what, one token left out of every row: must be found" "$out"/$stock_record.json "$out"/$what.json tokens:$t \
            $noise --task-of-ours broken:$t --expect-different
    done
    python3 table.py "$out"/gemma-big-fa.json "$out"/gemma-big-ours.json || failed=1
}

ranks() {
    local t=tokens:64x1000+77:32
    local dp="--shape 1.7b --kv-gib 6 --seqs 64 --tokens 4096 --mode graph --sizes 8,16,64 --ranks 2"
    local shared="--shape small --kv-gib 1 --seqs 64 --tokens 4096 --tp 2 --kv-heads 1"
    local times=time:128x2496+528:65
    rm -f "$out"/go-*
    PROGRAM=parallel.py drive dp-fa $dp --wait "$out"/go-fa --backend FLASH_ATTN $t $t:16 $times & local stock=$!
    sleep 1; PROGRAM=parallel.py drive dp-ours $dp --wait "$out"/go-ours $t $times & local ours=$!
    sleep 1; drive shared-fa $shared --backend FLASH_ATTN $t $t:16 & local small=$!
    sleep 1; drive dcp-fa $shared --dcp 2 --backend FLASH_ATTN $t & small="$small $!"
    sleep 1; drive dcp-ours $shared --dcp 2 $t & small="$small $!"
    sleep 1; drive dcp-graph $shared --dcp 2 --mode graph --sizes 8,16,64 $t & small="$small $!"
    wait $small
    touch "$out"/go-fa
    wait $stock
    touch "$out"/go-ours
    wait $ours
    rm -f "$out"/go-*
    failed_in_background "$out"/{dp-fa,dp-ours,shared-fa,dcp-fa,dcp-ours,dcp-graph}.json
    judge "two data-parallel ranks, FULL graphs: as stock?" "$out"/dp-fa.json "$out"/dp-ours.json $t \
        --noise "$out"/dp-fa.json $t:16
    for mode in ours graph; do
        judge "DCP 2, $mode: as stock with DCP 2?" "$out"/dcp-fa.json "$out"/dcp-$mode.json $t --noise "$out"/shared-fa.json $t
    done
    python3 table.py "$out"/dp-fa.json "$out"/dp-ours.json || failed=1
}

everything_happened() { # record, task
    python3 - "$@" << 'EOF' || failed=1
import json, sys

result = json.load(open(sys.argv[1]))["tasks"][sys.argv[2]]
counts = {name: value for name, value in result.items() if name != "requests"}
print("  ", counts)
sys.exit(not all(counts.values()))
EOF
}

logged() { # log
    grep -E "prefix_attn: .*: [0-9]+ steps: [0-9]+ on plans, .* on FlashAttention; plans read .* fewer KV bytes" "$1" | tail -1 | \
        cut -c1-260 | grep . || { failed=1; echo "  no line in the log: $1"; }
}

tp_tokens() {
    local t=tokens:64x1000+77:32 name
    local small="--shape small --kv-gib 1 --seqs 64 --tokens 4096 --tp 2" graph="--mode graph --sizes 8,16,64"
    # As in `killed`.
    local -x VLLM_WORKER_MULTIPROC_METHOD=${VLLM_WORKER_MULTIPROC_METHOD:-fork} LIMIT=${LIMIT:-100}
    # Half a second apart: each looks for a free port. Ranks that share a KV head are what decode context parallelism asks for.
    drive tp-fa $small --backend FLASH_ATTN $t $t:16 &
    sleep 0.5; drive tp-graph $small $graph $t &
    sleep 0.5; drive dcp-fa $small --kv-heads 1 --backend FLASH_ATTN --dcp 2 $t $t:16 &
    sleep 0.5; drive dcp-graph $small --kv-heads 1 $graph --dcp 2 $t &
    sleep 0.5; drive tp-eager $small $t &
    wait
    failed_in_background "$out"/tp-{fa,graph,eager}.json "$out"/dcp-{fa,graph}.json
    for name in tp-graph dcp-graph tp-eager; do
        judge "$name, two GPUs: as stock in the same arrangement?" "$out"/${name%-*}-fa.json "$out"/$name.json $t \
            --noise "$out"/${name%-*}-fa.json $t:16
    done
}

tp() {
    local ranks=${TP:-2} t=tokens:64x1000+77:32
    local graph="--shape small --kv-gib 1 --seqs 64 --tokens 4096 --tp $ranks --mode graph --sizes 8,16,64"
    # Ranks share a KV head in twos: what decode context parallelism asks for.
    local shared="--shape small --kv-gib 1 --seqs 64 --tokens 4096 --tp $ranks --kv-heads $((ranks / 2))"
    local times="time:64x2496+528:40 time:256x2496+528:40"
    local big="--shape 8b --kv-gib $((24 / ranks)) --tp $ranks --mode graph --seqs 256 --sizes 8,64,256"
    local LIMIT=${LIMIT:-230}
    rm -f "$out"/go-*
    # A second apart: each looks for a free port.
    drive tp-fa $graph --backend FLASH_ATTN $t $t:16 & local small=$!
    sleep 1; drive tp-triton $graph --backend TRITON_ATTN $t & small="$small $!"
    # A killed worker is the same whatever the number of ranks.
    sleep 1; drive tp-ours $graph $t $([ "$ranks" = 4 ] || echo fail:kill:64x1000+77:20) & small="$small $!"
    sleep 1; drive shared-fa $shared --backend FLASH_ATTN $t $t:16 & small="$small $!"
    sleep 1; drive dcp-fa $shared --dcp 2 --backend FLASH_ATTN $t & small="$small $!"
    sleep 1; drive dcp-ours $shared --dcp 2 $t & small="$small $!"
    sleep 1; drive dcp-graph $shared --dcp 2 --mode graph --sizes 8,16,64 $t & small="$small $!"
    sleep 1; drive 8b-tp-fa $big --wait "$out"/go-fa --backend FLASH_ATTN $times & local stock=$!
    sleep 1; drive 8b-tp-ours $big --wait "$out"/go-ours $times & local ours=$!
    wait $small
    # One engine measures at a time. What the killed worker's engine leaves behind ends within seconds.
    sleep 6
    touch "$out"/go-fa
    wait $stock
    touch "$out"/go-ours
    wait $ours
    rm -f "$out"/go-*
    failed_in_background "$out"/{tp-fa,tp-triton,tp-ours,shared-fa,dcp-fa,dcp-ours,dcp-graph,8b-tp-fa,8b-tp-ours}.json
    judge "TP $ranks, FULL graphs: as stock?" "$out"/tp-fa.json "$out"/tp-ours.json $t \
        --noise "$out"/tp-fa.json $t:16 --noise "$out"/tp-triton.json $t
    if [ "$ranks" != 4 ]; then
        judge "TP $ranks, before a worker is killed: as stock?" "$out"/tp-fa.json "$out"/tp-ours.json $t \
            --noise "$out"/tp-fa.json $t:16 --noise "$out"/tp-triton.json $t --task-of-ours fail:kill:64x1000+77:20
        said "$out"/tp-ours kill
    fi
    judge "DCP 2, eager: as stock with DCP 2?" "$out"/dcp-fa.json "$out"/dcp-ours.json $t --noise "$out"/shared-fa.json $t
    judge "DCP 2, eager: as stock without DCP?" "$out"/shared-fa.json "$out"/dcp-ours.json $t \
        --noise "$out"/dcp-fa.json $t --noise "$out"/shared-fa.json $t:16
    judge "DCP 2, FULL graphs: as stock with DCP 2?" "$out"/dcp-fa.json "$out"/dcp-graph.json $t \
        --noise "$out"/shared-fa.json $t
    python3 table.py "$out"/8b-tp-fa.json "$out"/8b-tp-ours.json || failed=1
}

failed_in_background() { # a drive in the background cannot set `failed`: its log ends with DONE, or not
    for file; do grep -qx DONE "${file%.json}.log" || { failed=1; echo "== failed: $file"; }; done
}

$job
[ $failed = 0 ] && echo "== $job: ALL GOOD" || echo "== $job: SOMETHING FAILED"
exit $failed
