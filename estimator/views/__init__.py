"""What a user looks at when asking why a number is what it is: memory over the step, a trace of it, where its time goes, and
what would change it. Plain data in, plain data out; the floors above draw."""
