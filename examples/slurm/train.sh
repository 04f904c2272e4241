#!/bin/bash
# A training on two nodes of eight GPUs that goes on by itself after a preemption:
#     sbatch examples/slurm/train.sh mine.yaml runs/mine [CONFIG.yaml]
# CONFIG.yaml has the lines that `san-llm recipes copy accelerate/two_nodes` brings.
# The folder is on a disk that all nodes see. See docs/distributed.md. Many clusters also want
# --account and --partition; and what the shell that submits has, such as an activated environment,
# comes along unless the cluster says otherwise.
#SBATCH --job-name=san-llm
#SBATCH --output=%x-%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

: "${2:?usage: sbatch examples/slurm/train.sh RECIPE RUN [CONFIG.yaml]}"
command -v san-llm >/dev/null || { echo "san-llm is not found: activate its environment first"; exit 2; }
recipe=$1 run=$2 config=${3:-recipes/accelerate/two_nodes.yaml}
export first recipe run config per_node=${SLURM_GPUS_ON_NODE:-8} port=$((20000 + SLURM_JOB_ID % 20000))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One task a node, which starts a process for each GPU. srun does not take --cpus-per-task from the
# job by itself, and would wait for nodes that are left when one has failed.
# shellcheck disable=SC2016
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
    mine=$(mktemp --suffix=.yaml)
    sed -e "s/^num_machines:.*/num_machines: $SLURM_NNODES/" \
        -e "s/^num_processes:.*/num_processes: $((SLURM_NNODES * per_node))/" \
        -e "s/^machine_rank:.*/machine_rank: $SLURM_NODEID/" \
        -e "s/^main_process_ip:.*/main_process_ip: $first/" \
        -e "s/^main_process_port:.*/main_process_port: $port/" "$config" >"$mine"
    if [ -f "$run/recipe.yaml" ]; then what=("$run" --resume); else what=("$recipe" --output "$run"); fi
    exec san-llm train "${what[@]}" --accelerate "$mine"
'
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
