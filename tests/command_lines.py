"""Many command lines in one forked process, for the price of one."""

import json

import processes

# A script's own modules define flags as they are imported: each command line imports them anew.
LOOP = """
import contextlib, io, json, os, runpy, sys, traceback
from pathlib import Path
from absl import flags

def forget(folder):
    for name in list(flags.FLAGS):
        if flags.FLAGS.find_module_defining_flag(name) not in ABSL:
            delattr(flags.FLAGS, name)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            KEPT.append(sys.modules.pop(name))  # absl knows modules by their addresses

ABSL = set(flags.FLAGS.flags_by_module_dict())
SCRIPT, KEPT = CODE, []
ends = []
for argv in json.loads(sys.argv[1]):
    sys.argv, status = argv, 0
    outputs = [io.StringIO(), io.StringIO()]
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        try:
            exec(SCRIPT, {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    ends.append([status, *(output.getvalue() for output in outputs)])
    forget(os.path.dirname(argv[0]))
print(json.dumps(ends))
"""
RUN = 'import runpy, sys\nrunpy.run_path(sys.argv[0], run_name="__main__")\n'


def outcomes(script, cases, cwd, code=RUN):
    """As `processes.outcomes`, one after another: for what ends before JAX has a device."""
    named = ([script, *flags] if script else flags for flags in cases.values())
    lines = [[str(processes.SCRIPTS / script), *flags] for script, *flags in named]
    loop = LOOP.replace("CODE", repr(code))
    (done,) = processes.outcomes("train.py", {"": [json.dumps(lines)]}, cwd, code=loop).values()
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    return {name: processes.Outcome(*end) for name, end in zip(cases, ends, strict=True)}
