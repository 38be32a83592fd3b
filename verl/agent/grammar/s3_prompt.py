"""The user messages that open an s3 trajectory; fields: question, docs, max_selected."""

from __future__ import annotations

from string import Template

PUBLISHED_PROMPT = Template("""\
You are a search assistant. Another model, the generator, will answer the question; your job is to find the documents \
it needs. You are given the question and the documents of a first retrieval.

Decide first whether these documents already hold everything that is needed to answer.

If they do, write
<search_complete>True</search_complete>
and nothing more.

If they do not, repeat these steps until they do:
1. Search with a query, written as a JSON object inside <query> and </query>:
<query>
{
    "query": "what to look for"
}
</query>
2. The results come back as numbered documents inside <information> and </information>.
3. Choose the documents that help to answer, at most $max_selected of the latest <information> block, and list their \
numbers inside <important_info> and </important_info>, for example <important_info>[1, 4]</important_info>.
4. After reading, say whether to go on: <search_complete>False</search_complete> followed by another query, or \
<search_complete>True</search_complete> to stop.

A query that follows an <information> block must come with <search_complete>False</search_complete>. You may think \
inside <think> and </think> at any point. The generator sees only what you mark as important information, so mark \
everything that it needs and leave out what it does not.

When the first documents are sufficient, the exchange is:
<search_complete>True</search_complete>

Otherwise it looks like this:
<query>
{
    "query": "..."
}
</query>
<information>
(search results)
</information>
<important_info>
[numbers]
</important_info>
<search_complete>
False
</search_complete>
<query>
{
    "query": "..."
}
</query>
(and so on, until)
<search_complete>
True
</search_complete>

Begin now with the question and the first documents below.
<question>
$question
</question>
<information>
$docs
</information>""")

# Tiny models were trained on exactly this text.
COMPACT_PROMPT = Template("""\
Search for the question, then stop.
<question>
$question
</question>
<information>
$docs
</information>""")
