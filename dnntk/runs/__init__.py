"""What a run leaves on disk: its folder, checkpoints, locks; and how it is interrupted."""
