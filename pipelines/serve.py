"""What a submitted job runs for `nev serve`, with `--replicas` or `--autoscale`.

ray job submit --working-dir . -- python pipelines/serve.py --model MODEL --replicas 4
"""

from nev.commands.main import make_pipeline

app = make_pipeline("serve")

if __name__ == "__main__":
    app()
