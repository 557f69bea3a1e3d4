"""Capitals of countries: a small task of real text for a pair of real language models.

A problem is ``What is the capital of France?`` in the model's chat format. The answer is the first city that the
response names.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from opdlab.data.prompts import ProblemSource
from opdlab.data.templates import ChatTemplate, Template
from opdlab.errors import require
from opdlab.types import Problem
from opdlab.verifiers.verifier import Verdict, Verifier

# Countries whose name is no part of their capital's. The Maldives are left out: Malé is a word without its accent.
_CAPITALS = """
Afghanistan: Kabul; Albania: Tirana; Algeria: Algiers; Angola: Luanda; Argentina: Buenos Aires; Armenia: Yerevan;
Australia: Canberra; Austria: Vienna; Azerbaijan: Baku; Bahrain: Manama; Bangladesh: Dhaka; Barbados: Bridgetown;
Belarus: Minsk; Belgium: Brussels; Belize: Belmopan; Bhutan: Thimphu; Botswana: Gaborone; Brazil: Brasília;
Bulgaria: Sofia; Burkina Faso: Ouagadougou; Cambodia: Phnom Penh; Cameroon: Yaoundé; Canada: Ottawa; Chad:
N'Djamena; Chile: Santiago; China: Beijing; Colombia: Bogotá; Costa Rica: San José; Croatia: Zagreb; Cuba: Havana;
Cyprus: Nicosia; Denmark: Copenhagen; Ecuador: Quito; Egypt: Cairo; El Salvador: San Salvador; Eritrea: Asmara;
Estonia: Tallinn; Ethiopia: Addis Ababa; Fiji: Suva; Finland: Helsinki; France: Paris; Gabon: Libreville; Georgia:
Tbilisi; Germany: Berlin; Ghana: Accra; Greece: Athens; Guinea: Conakry; Guyana: Georgetown; Haiti: Port-au-Prince;
Honduras: Tegucigalpa; Hungary: Budapest; Iceland: Reykjavik; India: New Delhi; Indonesia: Jakarta; Iran: Tehran;
Iraq: Baghdad; Ireland: Dublin; Italy: Rome; Jamaica: Kingston; Japan: Tokyo; Jordan: Amman; Kenya: Nairobi;
Kyrgyzstan: Bishkek; Laos: Vientiane; Latvia: Riga; Lebanon: Beirut; Liberia: Monrovia; Libya: Tripoli; Lithuania:
Vilnius; Madagascar: Antananarivo; Malawi: Lilongwe; Malaysia: Kuala Lumpur; Mali: Bamako; Malta: Valletta;
Mauritania: Nouakchott; Mauritius: Port Louis; Moldova: Chisinau; Mongolia: Ulaanbaatar; Montenegro: Podgorica;
Morocco: Rabat; Mozambique: Maputo; Namibia: Windhoek; Nepal: Kathmandu; New Zealand: Wellington; Nicaragua:
Managua; Niger: Niamey; Nigeria: Abuja; North Korea: Pyongyang; Norway: Oslo; Oman: Muscat; Pakistan: Islamabad;
Papua New Guinea: Port Moresby; Paraguay: Asunción; Peru: Lima; Poland: Warsaw; Portugal: Lisbon; Qatar: Doha;
Romania: Bucharest; Russia: Moscow; Rwanda: Kigali; Samoa: Apia; Saudi Arabia: Riyadh; Senegal: Dakar; Serbia:
Belgrade; Sierra Leone: Freetown; Slovakia: Bratislava; Slovenia: Ljubljana; Somalia: Mogadishu; South Korea: Seoul;
South Sudan: Juba; Spain: Madrid; Sudan: Khartoum; Suriname: Paramaribo; Sweden: Stockholm; Switzerland: Bern;
Syria: Damascus; Taiwan: Taipei; Tajikistan: Dushanbe; Thailand: Bangkok; Togo: Lomé; Tunisia: Tunis; Turkey:
Ankara; Turkmenistan: Ashgabat; Uganda: Kampala; Ukraine: Kyiv; Uruguay: Montevideo; Uzbekistan: Tashkent;
Venezuela: Caracas; Vietnam: Hanoi; Yemen: Sana'a; Zambia: Lusaka; Zimbabwe: Harare
"""
CAPITALS: dict[str, str] = dict(pair.split(": ") for pair in " ".join(_CAPITALS.split()).split("; "))
"""By country, in alphabetical order."""
_HELD_OUT_OF = 3  # one country of three

# Other spellings, and cities that a wrong answer may name. Cities that are called like their country are left out.
_ALSO = {
    "kiev": "kyiv",
    "ulan bator": "ulaanbaatar",
    "berne": "bern",
    "teheran": "tehran",
    "katmandu": "kathmandu",
    "peking": "beijing",
    "dacca": "dhaka",
    "ha noi": "hanoi",
}
_OTHER_CITIES = """
Abidjan; Abu Dhabi; Aleppo; Almaty; Andorra la Vella; Astana; Auckland; Bandar Seri Begawan; Bangui; Banjul; Barcelona;
Basseterre; Benghazi; Bissau; Bloemfontein; Brazzaville; Bujumbura; Cape Town; Casablanca; Castries; Colombo; Cotonou;
Dar es Salaam; Dili; Dodoma; Douala; Dubai; Funafuti; Geneva; Gitega; Guatemala City; Guayaquil; Ho Chi Minh City;
Honiara; Istanbul; Jeddah; Jerusalem; Johannesburg; Karachi; Kingstown; Kinshasa; Kuwait City; La Paz; Lagos; London;
Majuro; Malabo; Manila; Maseru; Mbabane; Mecca; Melbourne; Mexico City; Milan; Montreal; Moroni; Mumbai; Munich; Nassau;
Naypyidaw; New York; Nuku'alofa; Palikir; Panama City; Port of Spain; Port Vila; Porto-Novo; Prague; Praia; Pretoria;
Pristina; Rio de Janeiro; Roseau; Santo Domingo; Sao Paulo; Sarajevo; Shanghai; Skopje; Sucre; Sydney; Tarawa; Toronto;
Vaduz; Washington; Yamoussoukro; Yangon; Yaren; Zurich
"""


def _plain(text: str) -> str:
    """Return the text in lower case, without accents and apostrophes, with single spaces for space and dashes."""
    parts = unicodedata.normalize("NFKD", text)
    kept = "".join(part for part in parts if not unicodedata.combining(part)).casefold()
    kept = re.sub("[`\u02bc\u2018\u2019]", "'", kept)
    kept = re.sub(r"'s\b", " ", kept).replace("'", "")
    return re.sub(r"[\s_\u2010-\u2015-]+", " ", kept).strip()


class CapitalVerifier(Verifier):
    """Verifier that accepts a response if the first city in it is the gold capital.

    It knows the capitals of the world and some other large cities. Case, accents, apostrophes and dashes do not count,
    and other usual spellings are accepted. ``extracted`` is that city in plain lower case.

    Example:
        >>> responses = ["It is Brasilia, not Lima.", "Lima or Bras\u00edlia", "a large city"]
        >>> [verdict.correct for verdict in CapitalVerifier().verify(responses, ["Bras\u00edlia"] * 3)]
        [True, False, False]
    """

    def __init__(self) -> None:
        others = " ".join(_OTHER_CITIES.split()).split("; ")
        names = {*map(_plain, (*CAPITALS.values(), *others)), *_ALSO}
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        self._city = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """See :meth:`Verifier.verify`."""
        return [self._verdict(response, gold) for response, gold in zip(responses, golds, strict=True)]

    def _verdict(self, response: str, gold: str) -> Verdict:
        found = self._city.search(_plain(response))
        if found is None:
            return Verdict(False, None, "no answer")
        city = _ALSO.get(found[0], found[0])
        equal = city == _plain(gold)
        return Verdict(equal, city, "equal" if equal else "different")


class CapitalProblems(ProblemSource):
    """Source of questions for capitals.

    Args:
        split: ``train`` or ``held_out``; each country is in one of them.
        template: of the prompts; by default the tokenizer's chat template.

    Raises:
        UsageError: the split is unknown.

    Example:
        >>> problems = CapitalProblems("held_out").problems()
        >>> len(problems), problems[0].text, problems[0].answer
        (44, 'What is the capital of Albania?', 'Tirana')
    """

    def __init__(self, split: Literal["train", "held_out"] = "train", template: Template | None = None) -> None:
        super().__init__(template or ChatTemplate(), CapitalVerifier())
        require(split in ("train", "held_out"), f"split is '{split}', but must be train or held_out")
        self.split = split

    @property
    def name(self) -> str:
        """Return the name with the split."""
        return f"capitals ({self.split})"

    def problems(self) -> list[Problem]:
        """See :meth:`ProblemSource.problems`."""
        return [
            Problem(country, f"What is the capital of {country}?", capital)
            for number, (country, capital) in enumerate(CAPITALS.items())
            if (number % _HELD_OUT_OF == 1) == (self.split == "held_out")
        ]
