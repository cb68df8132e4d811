"""What a submitted job runs for `nev export`.

ray job submit --working-dir . -- python pipelines/export.py --checkpoint CHECKPOINT --format hf --output s3://BUCKET/MODEL
"""

from nev.commands.main import make_pipeline

app = make_pipeline("export")

if __name__ == "__main__":
    app()
