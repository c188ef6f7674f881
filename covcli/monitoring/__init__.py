"""The monitor at work: images checked and watched for drift, files inspected, a registry listed."""
