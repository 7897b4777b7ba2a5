"""The wire's messages: `locum.proto` and the code generated from it."""
