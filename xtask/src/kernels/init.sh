#!/bin/busybox sh
# The first process of a guest: makes it a host, runs the tests, says how they ended, ends it.
/bin/busybox mkdir -p /bin /sbin /dev /proc /sys /run /tmp
/bin/busybox --install -s /bin
export PATH=/loden:/usr/bin:/bin HOME=/root TMPDIR=/tmp
/bin/mount -t proc proc /proc
/bin/mount -t sysfs sys /sys
/bin/mount -t devtmpfs dev /dev 2>/dev/null
/bin/mount -t tmpfs tmp /tmp
/bin/mount -t tmpfs run /run
mkdir -p /run/netns /run/lock /dev/shm
/bin/mount -t bpf bpf /sys/fs/bpf
/bin/mount -t cgroup2 cgroup /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd

# QEMU ends at a write to this port, with the status 2 * value + 1.
leave() {
    sync
    printf "\\$1" | dd of=/dev/port bs=1 seek=244 conv=notrunc 2>/dev/null
    poweroff -f
}

while read -r file path; do
    insmod "/modules/$file" || echo "guest: $path is not loaded"
done </modules/order
ip link set lo up
ulimit -n 65536
sysctl -qw net.bridge.bridge-nf-call-iptables=1
echo "guest: kernel $(uname -r)"
# A test must not be able to hold the machine for ever.
timeout 900 /loden/cluster --test-threads=1 --nocapture $(cat /loden/tests)
status=$?
echo "guest: tests ended with $status"
if [ $status = 0 ]; then leave 000; else leave 001; fi
