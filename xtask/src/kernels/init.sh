#!/bin/busybox sh
# The first process of a guest: makes it a host, runs the tests, says how they ended, ends it.
/bin/busybox mkdir -p /bin /sbin /dev /proc /sys /run /tmp
/bin/busybox --install -s /bin
export PATH=/loden:/usr/bin:/bin HOME=/root TMPDIR=/tmp
/bin/mount -t proc proc /proc
/bin/mount -t sysfs sys /sys
/bin/mount -t devtmpfs dev /dev
/bin/mount -t tmpfs tmp /tmp
/bin/mount -t tmpfs run /run
mkdir -p /run/netns /run/lock /dev/shm
/bin/mount -t bpf bpf /sys/fs/bpf
/bin/mount -t cgroup2 cgroup /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd

while read -r file path; do
    insmod "/modules/$file" || echo "guest: $path is not loaded"
done </modules/order
ip link set lo up
ulimit -n 65536
sysctl -qw net.bridge.bridge-nf-call-iptables=1
echo "guest: kernel $(uname -r)"
# Emulated, everything takes longer.
export LODEN_SLOWNESS=5
# The clock goes by instructions, so what is timed may be compared.
if grep -q loden.instructions /proc/cmdline; then export LODEN_INSTRUCTIONS=1; fi
# A test must not be able to hold the machine for ever. The last line is what the result is read from.
# What only these kernels have is ignored elsewhere.
ended=0
for suite in programs cluster; do
    timeout 3400 /loden/$suite --include-ignored --test-threads=1 --nocapture $(cat /loden/$suite.tests) || ended=$?
done
echo "guest: tests ended with $ended"
sync
poweroff -f
