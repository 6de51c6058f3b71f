# The guest after its initramfs: the disk is read-only, so everything that is written is in memory.
# Starts the agent, which does what the tests ask for (agent.py).
for folder in tmp run project; do /bin/busybox mount -t tmpfs tmpfs /$folder; done
/bin/busybox mkdir -p /run/bin /dev/pts /dev/shm
/bin/busybox --install -s /run/bin
export PATH=/bin:/run/bin HOME=/tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ulimit -l unlimited
ulimit -n 65536
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
export PYTHONPATH=/site-packages OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 GRPC_VERBOSITY=NONE
echo "guest: up after $(cut -d' ' -f1 /proc/uptime) s"
# Programs are forks of the agent, so what they need to have loaded has to be loaded by it.
# Python is called by its own path, from which it finds its modules.
LD_PRELOAD=/guest/retry_count.so "$(readlink /guest/python)" /guest/agent.py
echo "guest: the agent has ended"
reboot -f  # ends the emulator, which is started with -no-reboot
