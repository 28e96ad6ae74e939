"""A frontend for plain OpenAI servers of any engine: dispatch, retries, drain, no migration.

One process that needs neither vLLM nor Ray. It holds the very scheduler that pools of instances
have (`llumsched.core`), one for each model, and sends each request as it came to the server that
the policy names.
"""
