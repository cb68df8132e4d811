#!/usr/bin/env bash
# Start an agent of this folder in the background, once on a node: agent.sh NAME [ARGUMENT...]. Its lines: ~/nev/log/NAME.log.
set -eu
name=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p ~/nev/log
export PATH="$HOME/nev/env/bin:$PATH" RAY_AUTH_MODE=token PYTHONUNBUFFERED=1
setsid --fork flock --nonblock ~/nev/log/"$name".lock python "$here/$name.py" "$@" >> ~/nev/log/"$name".log 2>&1 < /dev/null
