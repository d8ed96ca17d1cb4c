"""Talk to the model, turn by turn, until the input ends. Usage: chat.py [HOST:PORT]"""

import sys

from twinpool import Client, Message

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"

with Client(address) as client:
    messages: list[Message] = []
    print("> ", end="", flush=True)
    for question in sys.stdin:
        messages.append(Message(role="user", content=question.strip()))
        answer = ""
        for chunk in client.generate(messages, max_new_tokens=256):
            answer += chunk.text
            print(chunk.text, end="", flush=True)
        messages.append(Message(role="assistant", content=answer))
        print("\n> ", end="", flush=True)
