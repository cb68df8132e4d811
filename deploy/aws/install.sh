#!/usr/bin/env bash
# Make ~/nev/env, an environment with what ~/nev/requirements.lock pins. Does nothing where the environment has that lock already:
# so an image in which this has run needs no download.
set -eu
lock=$(sha256sum ~/nev/requirements.lock | cut -d ' ' -f 1)
test "$(cat ~/nev/env/lock 2> /dev/null)" != "$lock" || exit 0
# The system's Python is closed to pip, so an environment of its own.
test -x ~/nev/env/bin/pip || {
    sudo apt-get update -qq && sudo apt-get install -qq -y python3-venv
    python3 -m venv ~/nev/env
}
~/nev/env/bin/pip install --quiet "uv>=0.9"
~/nev/env/bin/uv pip install --quiet --python ~/nev/env/bin/python --require-hashes -r ~/nev/requirements.lock
echo "$lock" > ~/nev/env/lock
