"""Graph passes on Dynamo's FX graph: match, insert, verify."""
