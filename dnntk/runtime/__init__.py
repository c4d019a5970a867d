"""The machine: processes, devices, threads, progress bars."""
