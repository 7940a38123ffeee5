# Run by srun, once on every node: torchrun, which starts this node's processes.

# srun passes USR1 to every process of the step. torchrun would die of it; training processes set handlers of their own.
trap '' USR1

# Checkpoints are written over gloo. Their first rank hears from every other: it may need more than the usual 1024 files.
ulimit -Sn "$(ulimit -Hn)"

# The first node hosts the rendezvous, whatever it calls itself. SIGTERM comes by Slurm and again by torchrun, which then
# waits as long as saving may take. Everything is logged, the output of each node's first process goes to the job's as well.
exec $PYTHON -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$PROCESSES" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$ATTEMPT" --rdzv-conf=is_host=$((SLURM_NODEID == 0)) \
    --local-addr="$SLURMD_NODENAME" --shutdown-timeout="$GRACE" \
    --log-dir="$RUN/logs/$ATTEMPT/$SLURMD_NODENAME" --redirects=3 --tee=0:3 \
    "$CODE/slurm/worker.py" "$@"
