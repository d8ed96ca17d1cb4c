"""What requests come when: public traces, lengths and gaps drawn at random, and their tokens."""
