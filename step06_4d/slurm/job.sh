# The part of a job's script that is the same for every run. Above it, submit.py writes what this run is:
# ROOT, PYTHON, PROCESSES, GPUS, GRACE, PREFLIGHT, SRUN, SWEEP and OPTIONS.

log() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

ask() { # COMMAND: what Slurm answers. Again and again, for its controller may be starting anew
    local i
    for i in {1..12}; do
        "$@" 2>/dev/null && return
        sleep 5
    done
}

RUN=$ROOT
if [ ${#SWEEP[@]} -gt 0 ]; then
    # "lr=1e-4 tp=2" to the directory ROOT/lr=1e-4,tp=2 and the options --lr=1e-4 --tp=2.
    task=${SWEEP[SLURM_ARRAY_TASK_ID]}
    RUN=$ROOT/${task// /,}
    for pair in $task; do OPTIONS+=("--$pair"); done
fi
if [ -e "$RUN/finished" ]; then
    log "$RUN was finished before. To train further: more steps in $ROOT/config.yaml, and remove $RUN/finished"
    exit 0
fi
# One job of an array is also known by the number of all of them, which is that of the last one, too.
JOB=$(ask squeue --noheader --jobs "$SLURM_JOB_ID" --format="%A %i" | sed -n "s/^$SLURM_JOB_ID //p")
JOB=${JOB:-${SLURM_ARRAY_JOB_ID+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID-$SLURM_JOB_ID}}
# Two at a time would each take the other's unfinished checkpoint for one of a run that was killed. One that was
# cancelled may still be saving.
mine=$(ask squeue --noheader --me --states=RUNNING,COMPLETING --format=%i)
others=$(grep -Fx -f "$RUN/jobs" <<<"$mine" 2>/dev/null | grep -Fxv "$JOB")
if [ -n "$others" ]; then
    log "job $others runs in $RUN already, or has not ended yet"
    exit 1
fi
mkdir -p "$RUN/metrics" "$RUN/logs" && rm -f "$RUN/requeue" || exit 1
echo "$JOB" >>"$RUN/jobs"

# A job keeps its id when it is requeued; metrics, logs and the rendezvous are of this attempt.
ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES%%$'\n'*}
if [ -z "$HEAD" ]; then
    log "scontrol names no node in '$SLURM_JOB_NODELIST'"
    exit 1
fi
# Jobs that share a node must not share a port. Below the range that Linux gives to outgoing connections.
PORT=$((20000 + SLURM_JOB_ID % 5000 * 2))
CODE=$ROOT/code/step06_4d
export RUN ATTEMPT NODES HEAD PORT CODE PYTHON PROCESSES GPUS GRACE PREFLIGHT
# Else srun hands down nothing of this in a job that was submitted with --export=NONE.
export SLURM_EXPORT_ENV=ALL
# The snapshot comes before an installed `shared`.
export PYTHONPATH=$ROOT/code${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# torch's flight recorder: the last messages of each rank, written here when one fails or waits for too long.
FLIGHT=$RUN/flight/$ATTEMPT
mkdir -p "$FLIGHT"
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_FR_DUMP_TEMP_FILE=$FLIGHT/rank_
# Memory in pieces that can grow: less of it is lost between tensors.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
# A receive between two GPUs occupies one processor for each of its channels, also while it waits.
export NCCL_MAX_P2P_NCHANNELS=${NCCL_MAX_P2P_NCHANNELS:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / PROCESSES))}

# Slurm sends USR1 to this shell only, GRACE seconds before the time limit; from srun it goes to every process of the step.
step='' started='' training='' told=''
trap 'log "time is nearly up: training is to save and stop"; told=1; tell' USR1
tell() { # Again and again: a process that is still starting does not listen. srun itself would die of it at its start.
    [ -z "$training" ] || {
        [ $((SECONDS - started)) -ge 5 ] || sleep 5
        while kill -USR1 "$step" 2>/dev/null; do sleep 5; done
    } &
}
# `scancel` sends TERM to this shell as well, which has to wait for what is saved. CONT comes just before every signal; a
# trap of it would make bash 5.2 miss one USR1 in three.
trap : TERM

on_every_node() { # COMMAND: its exit code
    # srun takes neither from sbatch: --cpus-per-task is its own, and a step would get one core.
    srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "${SRUN[@]}" "$@" &
    step=$! started=$SECONDS
    [ -z "$told" ] || tell
    # A trap interrupts `wait`; when srun is gone, another one has its exit code.
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
}

requeue() { # WHY
    local state
    state=$(ask scontrol show job "$JOB" | grep -o 'JobState=[A-Z]*')
    # Else it was cancelled, for which training saves as well, or Slurm is requeueing it already.
    if [ "$state" = JobState=RUNNING ]; then
        log "$1, back to the queue"
        if scontrol requeue "$JOB"; then
            # Slurm ends this script.
            sleep 600
            exit 0
        fi
    fi
    log "$1; $state. To go on: sbatch ${SLURM_ARRAY_TASK_ID+--array=$SLURM_ARRAY_TASK_ID }$ROOT/job.sbatch"
    exit 85
}

missing() { # Who has not come where, as far as the flight recorder tells
    [ -n "$(ls "$FLIGHT")" ] || return
    log "what the flight recorder of $(ls "$FLIGHT" | wc -l) ranks says:"
    # The first message at which they differ: what comes after it follows from it.
    timeout 120 $PYTHON -m torch.distributed.flight_recorder.fr_trace "$FLIGHT" -p rank_ --allow-incomplete-ranks \
        --mismatch_cap 1 2>&1 | grep -v tabulate
}

failed() { # WHY CODE
    # A preemption signals the steps first. What cannot save yet, dies of it. Should this script end as well, Slurm would
    # take the job for failed and not requeue it.
    if [[ $(ask scontrol show job "$JOB") = *" PreemptTime="[0-9]* ]]; then
        requeue "preempted, $1"
    fi
    log "$1"
    exit "$2"
}

log "attempt $ATTEMPT on $SLURM_JOB_NODELIST, rendezvous at $HEAD:$PORT, logs of all ranks in $RUN/logs/$ATTEMPT"
if [ "$PREFLIGHT" -gt 0 ] && ! on_every_node $PYTHON "$CODE/slurm/preflight.py"; then
    failed "preflight failed, nothing was trained" 1
fi

OPTIONS+=(--metrics-file "$RUN/metrics/$ATTEMPT.jsonl")
OPTIONS+=(--checkpoint-dir "$RUN/checkpoints")
training=1
on_every_node bash "$CODE/slurm/node.sh" "${OPTIONS[@]}"
code=$?
# The mark is what counts: a step that is told to stop need not end with 0.
if [ -e "$RUN/requeue" ]; then
    requeue "saved"
fi
if [ $code != 0 ]; then
    missing
    failed "training failed with exit code $code; its ranks' output is in $RUN/logs/$ATTEMPT" $code
fi
touch "$RUN/finished"
log "finished"
