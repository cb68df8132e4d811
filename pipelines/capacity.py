"""What a submitted job runs for `nev capacity`.

ray job submit --working-dir . -- python pipelines/capacity.py --config CONFIG
"""

from nev.commands.main import make_pipeline

app = make_pipeline("capacity")

if __name__ == "__main__":
    app()
