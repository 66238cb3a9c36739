#!/usr/bin/env bash
# Tests and measures pat-rs on a machine with a GPU and without cargo.
#   ./run.sh [section ...]     sections: unit forests features grids soak grid first_use sanitizer timing (default: all)
# A finished section leaves .done-SECTION behind and is skipped next time; FORCE=1 runs it again.
set -u
cd "$(dirname "$0")"
# A test of as many devices as there are fails here where it cannot run: elsewhere it is ignored.
devices=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
case ${CUDA_VISIBLE_DEVICES-all} in
all) ;;
*) devices=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) ;;
esac
export PAT_REQUIRE_GPU=${PAT_REQUIRE_GPU:-$((devices > 1 ? devices : 1))}
passed=0
failed=0
skipped=0

step() { # name, command...
    local name=$1
    shift
    echo "== $name"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "== $name FAILED"
        section_ok=0
    fi
}

tests_like() { # pattern: the test executables it names; without one the section fails
    local file
    for file in tests/$1; do
        step "$(basename "$file")" "$file" --test-threads=1 --nocapture
    done
}

# Under racecheck; fails for other hazards than those of docs/kernels.md ("What compute-sanitizer says"): in a wgmma kernel a lane
# other than 0 reads before a warp of another part writes what an mbarrier has given back, or a widening warp's writes before a
# consumer does, or a consumer's writes zeros before a widening warp writes what has been given back.
racecheck() { # command...
    compute-sanitizer --tool racecheck --racecheck-report hazard --print-limit 1000000 --show-backtrace no "$@" 2>&1 | awk '
        /hazard detected at __shared__/ { kind = $0; sub(/ hazard.*/, "", kind); sub(/.* /, "", kind); accesses = 0 }
        kind && /(Read|Write) Thread \(/ {
            thread = $0; sub(/.*Thread \(/, "", thread); sub(/,.*/, "", thread)
            place = $0; sub(/.* at /, " at ", place); what = $0 ~ /Read Thread/ ? "read" : "write"
            accesses++
            if (accesses == 1) { first = what; reader = thread + 0; first_place = place; next }
            writer = thread + 0
            in_wgmma = place ~ /_wgmma/ && reader % 32 > 0
            widens = place ~ /_e[45]m[23]/ && reader >= 32 && reader < 128
            gives_back = kind == "WAR" && first == "read" && (reader >= 128 ? writer < 128 : widens && writer < 32)
            hands_on = kind == "WAW" && first == "write" && widens && writer >= 128
            widened = place ~ /_e[45]m[23]/ && writer >= 32 && writer < 128
            gives_zeros_back = kind == "WAW" && first == "write" && reader >= 128 && widened
            if (in_wgmma && (gives_back || hands_on || gives_zeros_back)) { known++ }
            else if (others++ < 10) { print "OTHER: " kind ", " first " by " reader first_place ", " what " by " thread place }
            kind = ""; next
        }
        /RACECHECK SUMMARY:/ { summary = $0; sub(/.*SUMMARY: /, "", summary); counted = summary + 0; summaries++ }
        /^=========( |$)/ && !/SUMMARY|returned/ { next }
        { print }
        END {
            print known + 0 " hazards of the known kind, " others + 0 " others"
            # A report in other words would count as none.
            if (summaries != 1 || counted != known + others) { print "racecheck says " counted + 0; exit 1 }
            exit others > 0
        }'
    local status=("${PIPESTATUS[@]}")
    [ "${status[0]}" = 0 ] && [ "${status[1]}" = 0 ]
}

section() {
    case $1 in
    unit)
        tests_like 'pat_rs'
        tests_like 'gpu_smoke'
        tests_like 'gpu_graphs'
        tests_like 'gpu_launches'
        tests_like 'gpu_faults'
        ;;
    forests) tests_like 'gpu_forests' ;;
    features)
        tests_like 'gpu_scores'
        tests_like 'gpu_isolation'
        tests_like 'gpu_eight_bit'
        tests_like 'gpu_trees'
        tests_like 'gpu_models'
        tests_like 'gpu_shapes'
        tests_like 'gpu_steps'
        ;;
    # What the suites of other libraries cover; PAT_GPU_GRIDS sets how many combinations of each.
    grids) tests_like 'gpu_grids' ;;
    # On a device that nothing else uses: its free memory is judged.
    soak) step soak tests/soak ;;
    # Verified before they are timed; a run that was cut off goes on where it stopped.
    grid) step grid ./pat bench kernels --device cuda --output grid.json --resume ;;
    # How long the driver compiles each kernel, without what it has compiled before; FIRST_USE_SECONDS bounds it.
    first_use) CUDA_CACHE_DISABLE=1 step first_use tests/first_use "${FIRST_USE_SECONDS:-300}" ;;
    sanitizer)
        if ! command -v compute-sanitizer >/dev/null; then
            echo "== sanitizer: skipped, compute-sanitizer is not on the PATH"
            skipped=$((skipped + 1))
            return
        fi
        local tool test forests checked
        for tool in memcheck initcheck racecheck synccheck; do
            for test in forests scores isolation eight_bit trees; do
                # Of scores every variant has to have every kind.
                forests=6
                [ $test != scores ] || forests=100
                checked=(compute-sanitizer --tool "$tool" --error-exitcode 9)
                [ $tool != racecheck ] || checked=(racecheck)
                PAT_GPU_FORESTS=$forests step "$tool, $test" "${checked[@]}" "tests/gpu_$test" --test-threads=1 \
                    --nocapture --skip cpu --skip interpreted --skip codes --skip refused --skip likewise
            done
        done
        ;;
    timing) step timing ./pat bench kernels --device cuda --quick --output timing.json --force ;;
    *)
        echo "unknown section $1"
        exit 2
        ;;
    esac
}

[ $# -gt 0 ] || set -- unit forests features grids soak grid first_use sanitizer timing
for name in "$@"; do
    if [ -e ".done-$name" ] && [ -z "${FORCE:-}" ]; then
        echo "== $name: done earlier (FORCE=1 runs it again)"
        skipped=$((skipped + 1))
        continue
    fi
    section_ok=1
    section "$name"
    [ $section_ok = 1 ] && touch ".done-$name"
done
echo "$passed passed, $failed failed, $skipped skipped"
if [ $((passed + failed + skipped)) = 0 ]; then
    echo "nothing ran"
    exit 1
fi
[ $failed = 0 ]
