import os

# Ray gives up on a process that does not answer in time, which on a busy machine is no news about the code
for setting, seconds in (("raylet_start_wait_time_s", 300), ("worker_register_timeout_seconds", 300)):
    os.environ.setdefault(f"RAY_{setting}", str(seconds))
