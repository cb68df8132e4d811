"""What a submitted job runs for `nev prepare`.

ray job submit --working-dir . -- python pipelines/prepare.py --source webdataset --input TARS --output s3://BUCKET/train
"""

from nev.commands.main import make_pipeline

app = make_pipeline("prepare")

if __name__ == "__main__":
    app()
