"""Training: `experiment` runs `driver` on this machine, `worker` in each training process, and `core`, pure torch, in a step."""
