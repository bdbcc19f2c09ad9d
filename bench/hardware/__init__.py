"""`make hardware`: everything that waits for a GPU, in one go and within minutes: what runs, what is right, how fast.

Stages follow one another, each in processes of its own under a limit of its own (`stages`, `runner`), each made of
cases (`work`) that say how they ended as they end (`lines`). `python -m bench.hardware FOLDER` runs them.
"""
