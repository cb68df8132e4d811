#!/usr/bin/env bash
# Make the folder /mnt/spill: on the node's instance storage where there is some, else on the disk of the system.
set -eu
sudo mkdir -p /mnt/spill
if ! mountpoint -q /mnt/spill; then
    # AWS's Deep Learning images mount instance storage themselves.
    if mountpoint -q /opt/dlami/nvme; then
        sudo mount --bind /opt/dlami/nvme /mnt/spill
    else
        disk=$(lsblk -dpno NAME,MODEL | awk '/Instance Storage/ {print $1; exit}')
        if [ -n "$disk" ]; then
            sudo mkfs.ext4 -q -E nodiscard "$disk" && sudo mount "$disk" /mnt/spill
        fi
    fi
fi
sudo chown "$USER" /mnt/spill
