#!/bin/sh
# Runs two commands in two network namespaces, which one cable joins: `unshare --user --map-root-user --net
# two_networks.sh FIRST SECOND`. Each has an address of its own, 10.77.0.1 and 10.77.0.2, on an interface eth0.
# Exits with the first status that is not 0. Without commands it only lays the cable.
set -e
ip link set lo up
unshare --net sleep 600 &
peer=$!
trap 'kill $peer' EXIT
in_peer() { nsenter --net="/proc/$peer/ns/net" "$@"; }
while [ "$(readlink /proc/$peer/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add eth0 type veth peer name eth0 netns $peer
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up
in_peer ip addr add 10.77.0.2/24 dev eth0
in_peer ip link set eth0 up
in_peer ip link set lo up
[ $# -eq 0 ] && exit
in_peer sh -c "$2" &
second=$!
sh -c "$1" || { status=$?; kill $second 2>/dev/null || true; exit $status; }
wait $second
