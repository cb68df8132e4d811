"""What a submitted job runs for `nev evaluate`.

ray job submit --working-dir . -- python pipelines/evaluate.py --checkpoint CHECKPOINT
"""

from nev.commands.main import make_pipeline

app = make_pipeline("evaluate")

if __name__ == "__main__":
    app()
