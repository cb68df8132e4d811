"""What a submitted job runs for `nev demo`, on a machine whose port a browser reaches.

ray job submit --working-dir . -- python pipelines/demo.py --model MODEL FOLDER
"""

from nev.commands.main import make_pipeline

app = make_pipeline("demo")

if __name__ == "__main__":
    app()
