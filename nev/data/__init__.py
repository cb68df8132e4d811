"""The data plane: which rows (`plan`), where they lie (`index`), how they become arrays (`block`, `decode`), on Ray
(`stream`)."""
