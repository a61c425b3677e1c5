#!/usr/bin/env bash
# One machine of a run on several machines:
#   scripts/cluster/node.sh run.name=NAME recipe=gemma4_sft ...
#
# Starts `accelerate launch train.py` for this machine, in the repository's folder. SIGUSR1 and
# SIGTERM ask the run to save and stop. The exit code says what to do next, which that of the
# launcher does not (it is 1 for every reason):
#   0    the run is finished
#   75   it was stopped, not at an end: run the same command again. Also after a rank hung or was lost,
#        if the run had got further than the start before: one that hangs in the same step is at an end
#   1..  it failed, or a person stopped it with Ctrl-C: somebody has to look at it
#
# Environment (the SLURM and SkyPilot files set it):
#   NUM_MACHINES, MACHINE_RANK (default: SLURM_NODEID), PROCESSES_PER_MACHINE (its GPUs),
#   HEAD_ADDRESS and HEAD_PORT (where machine 0 listens), PYTHON (default: .venv, or python)
set -u
: "${NUM_MACHINES:?}" "${PROCESSES_PER_MACHINE:?}" "${HEAD_ADDRESS:?}" "${HEAD_PORT:?}"
machine_rank=${MACHINE_RANK:-${SLURM_NODEID:?neither MACHINE_RANK nor SLURM_NODEID is set}}
again=75

run_dir=runs
run_name=
for argument in "$@"; do
    case $argument in
        run.dir=*) run_dir=${argument#run.dir=} ;;
        run.name=*) run_name=${argument#run.name=} ;;
    esac
done
if [ -z "$run_name" ]; then
    echo "error: run.name= is missing: how the run ended is read from runs/NAME/status.json" >&2
    exit 2
fi
status_file=$run_dir/$run_name/status.json

python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python

# The status that a former start left there says nothing about this one.
status_version() { stat --format='%i %y' "$status_file" 2>/dev/null; }
former_status=$(status_version)
read_status() { # status, or step
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$status_file" "$1"
}
former_step=0
[ -z "$former_status" ] || former_step=$(read_status step)
status() {
    [ "$(status_version)" = "$former_status" ] || read_status status
}

# torchrun kills the ranks this long after it has passed SIGTERM on: they may be saving. Shorter than
# the notice that the scheduler gives (--signal in slurm.sbatch).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}

asked=
interrupted=
# shellcheck disable=SC2329 # called by the trap
stop() {
    interrupted=yes
    [ -z "$asked" ] || return 0 # a second SIGTERM would have the launcher stop waiting
    asked=yes
    # The launcher passes SIGTERM on to the ranks. Of SIGUSR1 it would die.
    [ -z "${launcher:-}" ] || kill -TERM "$launcher"
}
trap stop USR1 TERM

"$python" -m accelerate.commands.launch \
    --config_file configs/accelerate/several_machines.yml \
    --num_machines "$NUM_MACHINES" \
    --num_processes "$((NUM_MACHINES * PROCESSES_PER_MACHINE))" \
    --machine_rank "$machine_rank" \
    --main_process_ip "$HEAD_ADDRESS" \
    --main_process_port "$HEAD_PORT" \
    train.py "$@" &
launcher=$!
[ -z "$asked" ] || kill -TERM "$launcher"

# A signal ends `wait` early; the second `wait` gets the code, or 127 if the first one had it.
code=1
while :; do
    interrupted=
    wait "$launcher"
    result=$?
    [ "$result" -eq 127 ] || code=$result
    [ -n "$interrupted" ] || break
done

if [ "$code" -ne 0 ]; then
    case $(status) in
        preempted) code=$again ;;
        hung) [ "$(read_status step)" -le "${former_step:-0}" ] || code=$again ;;
        finished | failed | interrupted) ;;
        *) [ -z "$asked" ] || code=$again ;; # stopped before it had anything to save
    esac
fi
exit "$code"
