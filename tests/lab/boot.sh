#!/bin/sh
# What a test host is made of. Runs as pid 1 in the new namespaces of a host and ends when its stdin does.
# Usage: boot.sh NAME STAGE PERSIST "CGROUP=OPTIONS ..." VISIBLE...
#   STAGE    an empty directory for the host's root       PERSIST  the host's disk: outlives the host
#   CGROUP   place below /sys/fs/cgroup                   OPTIONS  of mount -t cgroup; empty: cgroup2
#   VISIBLE  paths that are the same, read-only, in every host
set -eu
name=$1 stage=$2 persist=$3 cgroups=$4
shift 4

mount -t tmpfs -o mode=0755 stage "$stage"
root=$stage/root
mkdir "$stage/upper" "$stage/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$stage/upper,workdir=$stage/work" root "$root"

mount --bind /dev "$root/dev"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777,nosuid,nodev shm "$root/dev/shm"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t sysfs -o nosuid,nodev,noexec sysfs "$root/sys"
mount -t tmpfs -o mode=0755,nosuid,nodev run "$root/run"
mount -t tmpfs -o mode=1777,nosuid,nodev tmp "$root/tmp"
# Hides the disks of the other hosts, which lie there.
mount -t tmpfs -o mode=1777,nosuid,nodev tmp "$root/var/tmp"

case $cgroups in
.=*)
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    # A cgroup with controllers for its children may hold no process itself.
    mkdir -p "$root/sys/fs/cgroup/init"
    echo 0 >"$root/sys/fs/cgroup/init/cgroup.procs"
    for controller in $(cat "$root/sys/fs/cgroup/cgroup.controllers"); do
        echo "+$controller" >"$root/sys/fs/cgroup/cgroup.subtree_control"
    done
    ;;
*)
    mount -t tmpfs -o mode=0755 cgroup "$root/sys/fs/cgroup"
    for entry in $cgroups; do
        at=$root/sys/fs/cgroup/${entry%%=*} options=${entry#*=}
        mkdir -p "$at"
        if [ -n "$options" ]; then
            mount -t cgroup -o "$options" cgroup "$at"
        else
            mount -t cgroup2 cgroup2 "$at"
        fi
    done
    ;;
esac

for path in var/lib/containers-lab var/lib/migrate etc/migrate; do
    mkdir -p "$persist/$path" "$root/$path"
    mount --bind "$persist/$path" "$root/$path"
done
for path in "$@"; do
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
    mount -o remount,bind,ro "$root$path"
done
mkdir -p "$root/run/netns" "$root/run/lock"
echo "$name" >"$root/etc/hostname"
hostname "$name"

cd "$root"
mkdir .old
pivot_root . .old
umount -l /.old
rmdir /.old
cd /

# An ignored SIGCHLD reaps orphans without anybody waiting. Source: waitpid(2), NOTES.
trap '' CHLD
echo ready
exec cat >/dev/null
