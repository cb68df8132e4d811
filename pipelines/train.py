"""What a submitted job runs for `nev train`.

ray job submit --working-dir . -- python pipelines/train.py --config CONFIG --set output=s3://BUCKET/runs
"""

from nev.commands.main import make_pipeline

app = make_pipeline("train")

if __name__ == "__main__":
    app()
