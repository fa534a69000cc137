#!/bin/sh
# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

# A Slurm of one node on this machine, for the tests: without systemd, on the loopback interface.
#
#     slurm.sh start DIRECTORY PORT    starts it; then `SLURM_CONF=DIRECTORY/slurm.conf sbatch ...` works
#     slurm.sh stop DIRECTORY          stops what was started there

command=$1
directory=$2
port=$3

if [ "$command" = stop ]; then
    for name in slurmctld slurmd munged; do
        [ -s "$directory/$name.pid" ] && kill "$(cat "$directory/$name.pid")"
    done
    exit 0
fi

mkdir -p "$directory/state" "$directory/spool" "$directory/munge"
chmod 700 "$directory/munge"
dd if=/dev/urandom of="$directory/munge/key" bs=1024 count=1 2>/dev/null
chmod 600 "$directory/munge/key"
host=$(hostname -s)
cat >"$directory/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$directory/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
KillWait=15
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$directory/slurm.conf"
munged --force --key-file="$directory/munge/key" --socket="$directory/munge/socket" \
    --pid-file="$directory/munged.pid" --seed-file="$directory/munge/seed" \
    --log-file="$directory/munge/log" || exit 1
slurmctld -c && slurmd -c || exit 1
for _ in $(seq 60); do
    sinfo --noheader --format=%t 2>/dev/null | grep -q idle && exit 0
    sleep 0.5
done
echo "Slurm did not come up; its logs are in $directory." >&2
cat "$directory/slurmctld.log" "$directory/slurmd.log" >&2
exit 1
