"""The server as a child process of a desktop application, with nothing but the standard library on its side."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
command = [sys.executable, "-m", "edgemistral", "serve", model, "--port", "0"]       # port 0: any free one
with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
    url = server.stdout.readline().strip()       # printed once the port is open
    if not url:
        sys.exit("the server did not start")
    try:
        while True:                              # the model loads meanwhile
            try:
                urllib.request.urlopen(url + "/health").close()
                break
            except urllib.error.HTTPError:
                time.sleep(0.1)
        body = {"messages": [{"role": "user", "content": "What should I see in Paris?"}], "max_tokens": 40, "seed": 1}
        request = urllib.request.Request(
            url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            print(json.load(response)["choices"][0]["message"]["content"])
    finally:
        server.terminate()
