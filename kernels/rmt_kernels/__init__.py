"""Operations of one RMT segment step. Each op is a folder: a door (`plan`), `ref.py` (fp32 truth), and its backends."""
