"""What a submitted job runs for `nev ablate`.

ray job submit --working-dir . -- python pipelines/ablate.py --config SWEEP
"""

from nev.commands.main import make_pipeline

app = make_pipeline("ablate")

if __name__ == "__main__":
    app()
