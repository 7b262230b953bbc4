#!/bin/bash
# The first process of the guest. The root is the host's, read-only; whatever is written to is new and empty here.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM=dumb
# In user-mode Linux a page fault takes 0.1 ms: what programs have given back to their allocator stays with them.
export MALLOC_TRIM_THRESHOLD_=134217728 MALLOC_TOP_PAD_=1048576 MALLOC_MMAP_THRESHOLD_=33554432
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -sfn /proc/self/fd /dev/fd
mount -t bpf bpf /sys/fs/bpf 2>/dev/null
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
mount -t tmpfs -o mode=755 mnt /mnt
mkdir /mnt/control /mnt/host
mount -t "$CONTROL_TYPE" -o "$CONTROL_OPTIONS" control /mnt/control
# Tells that this kernel is alive, whatever the command does.
while :; do
    date +%s >/mnt/control/alive
    sleep 5
done &
# The host's files, those too over which something new is mounted below.
mount --bind / /mnt/host
for folder in /tmp /run /var/tmp; do mount -t tmpfs -o mode=1777 new $folder; done
mkdir -p /run/netns /run/lock
# A checkout under /tmp would be hidden by what was just mounted there.
if ! [ -e "$CHECKOUT/Cargo.toml" ]; then
    mkdir -p "$CHECKOUT"
    mount --bind "/mnt/host$CHECKOUT" "$CHECKOUT"
fi
modules=/mnt/host$KERNEL
if [ -d "$modules/lib/modules" ]; then
    printf '#!/bin/sh\nexec /sbin/modprobe --dirname "%s" "$@"\n' "$modules" >/run/modprobe
    chmod 755 /run/modprobe
    echo /run/modprobe >/proc/sys/kernel/modprobe
    /run/modprobe -a ipv6 esp4 esp6 xfrm_user veth tun gcm ghash-generic ctr cbc seqiv echainiv authenc sha512_generic chacha20poly1305 drbg xfrm_interface
    # Not every kernel has it.
    /run/modprobe -q netdevsim
fi
ip link set lo up
stty -F "$OUTPUT" raw -echo 2>/dev/null
setsid bash /mnt/control/command </dev/null >"$OUTPUT" 2>&1
echo $? >/mnt/control/status
sync
echo o >/proc/sysrq-trigger
sleep 5
