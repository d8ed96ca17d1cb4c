"""Talk to the model, turn by turn; an empty line ends it. Usage: chat.py [HOST:PORT]"""

import sys

from twinpool import Client, Message

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"

with Client(address) as client:
    messages: list[Message] = []
    while question := input("> "):
        messages.append(Message(role="user", content=question))
        answer = ""
        for chunk in client.generate(messages, max_new_tokens=256):
            answer += chunk.text
            print(chunk.text, end="", flush=True)
        print()
        messages.append(Message(role="assistant", content=answer))
