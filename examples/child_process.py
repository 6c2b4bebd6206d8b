"""The server as a child process of a desktop application, which needs only the standard library."""

import json
import subprocess
import sys
import urllib.request

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
command = [
    sys.executable, "-m", "edgemistral", "serve", model,
    "--port", "0",          # any free one
    "--announce",           # one line of JSON, once requests are answered
    "--parent-watch",       # it stops when we end, even after a crash: its standard input closes then
]
with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
    line = server.stdout.readline()
    if not line:            # the reason is on standard error
        sys.exit("the server did not start")
    told = json.loads(line)
    messages = [{"role": "user", "content": "What should I see in Paris?"}]
    request = urllib.request.Request(
        told["url"] + "/v1/chat/completions",
        json.dumps({"messages": messages, "max_tokens": 40, "seed": 1, "stream": True}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {told['key']}"},
    )
    with urllib.request.urlopen(request) as response:
        for event in response:                                   # server-sent events: lines of "data: {...}"
            if event.startswith(b"data: {"):
                choices = json.loads(event[6:])["choices"]
                print(choices[0]["delta"].get("content") or "" if choices else "", end="", flush=True)
    print()
    server.stdin.close()    # ends it cleanly
