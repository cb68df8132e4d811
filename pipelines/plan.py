"""What a submitted job runs for `nev plan`.

ray job submit --working-dir . -- python pipelines/plan.py --config CONFIG --gpu GPU --gpus GPUS
"""

from nev.commands.main import make_pipeline

app = make_pipeline("plan")

if __name__ == "__main__":
    app()
