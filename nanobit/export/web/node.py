"""JavaScript in Node, to compare the scripts of a page with the Python that they repeat."""

import json
import os
import shutil
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))


def is_installed():
    return shutil.which("node") is not None


def call(names, expression, **data):
    """Return the value of an expression in JavaScript, or what it promises, after the scripts of this folder
    with these names; the values of `data` are variables there. All go through JSON. RuntimeError with Node's
    message if it fails."""
    scripts = []
    for name in names:
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            scripts.append(file.read())
    variables = "".join(f"var {name} = input.{name};\n" for name in data)
    # the scripts come first, so that line numbers in an error are those of the first one
    main = f"const input = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n{variables}"
    # exit: an open port of a MessageChannel would keep Node waiting
    answer = "(value) => process.stdout.write(JSON.stringify(value), () => process.exit())"
    main += f"Promise.resolve({expression}).then({answer});\n"
    command = ["node", "-e", "\n".join([*scripts, main])]
    result = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise RuntimeError(result.stderr.strip()[-2000:])
    return json.loads(result.stdout)
