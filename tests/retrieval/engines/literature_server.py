"""The demo server with faults on demand, and answers as the real services give them.

    python -m tests.retrieval.engines.literature_server --port 8123

serves the right answers only. The recorded answers are shortened; ids and texts are the services' own shapes.
"""

from __future__ import annotations

from collections import deque

from verl.retrieval.engines.demo_server import Asked, DemoServer, Reply, main

KEY = "secret-KEY_0123456789"

ESEARCH_JSON = b"""{"header":{"type":"esearch","version":"0.3"},
"esearchresult":{"count":"3","retmax":"3","retstart":"0",
"idlist":["31452104","31437182","31452104"],"translationset":[{"from":"asthma","to":"\\"asthma\\"[MeSH Terms]"}],
"querytranslation":"\\"asthma\\"[MeSH Terms]	OR x","errorlist":{"phrasesnotfound":["qqqq"],"fieldsnotfound":[]},
"warninglist":{"phrasesignored":["the"],"quotedphrasesnotfound":["\\"zz zz\\""],"outputmessages":[]}}}"""

ESEARCH_XML = b"""<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE eSearchResult PUBLIC "-//NLM//DTD esearch 20060628//EN"
 "https://eutils.ncbi.nlm.nih.gov/eutils/dtd/20060628/esearch.dtd">
<eSearchResult><Count>3</Count><RetMax>3</RetMax><RetStart>0</RetStart><IdList>
<Id>31452104</Id>
<Id>31437182</Id>
<Id>31452104</Id>
</IdList><TranslationSet/><QueryTranslation>"asthma"[MeSH Terms]</QueryTranslation>
<ErrorList><PhraseNotFound>qqqq</PhraseNotFound></ErrorList>
<WarningList><PhraseIgnored>the</PhraseIgnored></WarningList></eSearchResult>"""

STUDIES = b"""{"totalCount":2,"studies":[{"protocolSection":{"identificationModule":{"nctId":"NCT04852770",
"briefTitle":"A  Study\\nof Asthma"},"descriptionModule":{"briefSummary":"Line one.\\n\\nLine two."}}},
{"protocolSection":{"identificationModule":{"nctId":"NCT01728545"}}}]}"""

RATE_EXCEEDED = b'{"error":"API rate limit exceeded","api-key":"%s","count":"11","limit":"10"}' % KEY.encode()
BACKEND_FAILED = b'{"header":{"type":"esearch"},"esearchresult":{"ERROR":"Search Backend failed: Couldn\'t connect."}}'
MAINTENANCE = b"<!DOCTYPE html><html><body>The service is being maintained.</body></html>"


class LiteratureServer(DemoServer):
    """Faults are used up one per request, in order; then `always` holds, if it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = (KEY,)
        self.faults: deque[Reply | None] = deque()
        self.always: Reply | None = None
        self.fault = self._next

    def _next(self, _: Asked) -> Reply | None:
        return self.faults.popleft() if self.faults else self.always


if __name__ == "__main__":
    main()
