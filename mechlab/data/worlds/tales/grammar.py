"""The grammar of tales, as text: words, sentences and plots. ``tables`` turns it into arrays.

The sentences that carry a mood are in ``moods``. How to read it:

- ``{A}`` and ``{B}`` are the person a sentence is about and the other one; ``{he} {him} {his} {girl}`` are said of A;
  ``{thing} {place} {in} {colour} {goods} {mood} {many} {more} {sum} {asked} {yes}`` are A's own (``{thing2}``: B's).
  They are drawn once per document and keep their value, so they can be asked for later.
- ``[colour]`` and all square brackets are drawn anew wherever they stand and mean nothing; "a" becomes "an" by itself.
- A plot is a list of steps. ``fact@B`` tells of the second person, so that its ``{A}`` is the second person; ``@R`` is
  one of the first two at random and ``@S`` then the other; ``@%`` goes round the first ``period`` persons; ``@5`` is
  one of the first five, drawn anew at every step, so that nothing can be had by elimination. ``?`` means half of the
  time, ``*0-4`` none to four times, ``&`` if and only if the step before stands. The number in front is the plot's
  share of its genre.
"""

from __future__ import annotations

# Names and things come in three pools (train, dev, test) for experiments. Documents for training use all of them.
GIRLS = (
    "anna mia lily sara ella zoe nina ruth",
    "emma lucy kate maya jane ida clara tess",
    "amy eva nora leah alice molly vera greta",
)
BOYS = (
    "tom ben sam max leo jack paul adam",
    "tim fred luke noah hugo carl finn theo",
    "dan joe otto peter ralph oscar ivan simon",
)
THINGS = (
    "ball kite doll drum book cup hat coin key rope lamp spoon apple basket shell umbrella",
    "box cap bag brush pen map ring shoe clock whistle puzzle train blanket egg ladder oar",
    "robot car boat flute crayon bucket mirror pillow scarf stone feather candle onion violin spade torch",
)
PLACES = {
    "in": "kitchen garden park barn library forest yard attic shop meadow cave castle orchard cellar office",
    "at": "school beach lake farm station market zoo harbour",
    "on": "hill bridge island",
}
NUMBERS = "one two three four five six seven eight nine"

CLASSES = {
    "colour": "red blue green yellow white black brown pink purple grey orange",
    "goods": "pears plums nuts buns cherries carrots beans buttons marbles cards peas stamps",
    "part": "morning afternoon evening",
    "weekday": "monday tuesday wednesday thursday friday saturday sunday",
    "season": "spring summer autumn winter",
    "weather": "sunny windy cloudy rainy dry mild warm cool",
    "size": "big small old new large plain fine",
    "trait": "kind clever quiet young polite brave shy busy tall",
    "relative": "mother father brother sister friend",
    "landmark": "gate fence well post bench hedge fountain arch",
    "building": "house mill inn chapel hut cottage stable tower",
    "tree": "oak elm pine birch willow beech",
    "animal": "duck goat hen cow sheep horse goose owl pig donkey",
    "animals": "ducks goats hens cows lambs horses owls pigs donkeys",
    "crop": "corn wheat clover barley",
    "material": "wood clay brick straw iron tin",
    "worker": "baker miller farmer painter gardener sailor driver smith",
    "several": "two three four five six seven eight nine",
}

# Neutral sentences without persons of the tale: they stand between the others, and are the genre "filler".
FILLER = """
    the sun stood over the [landmark] .
    a [colour] hen sat on the [landmark] .
    the wind blew through the [tree] .
    it was a [weather] [part] .
    there was a [size] path behind the [building] .
    a [colour] cart stood near the [building] .
    the river ran past the [building] .
    some people walked along the street .
    a [animal] stood in the field .
    there were [several] [animals] in the field .
    the [building] had a [colour] roof .
    clouds lay over the [building] .
    the road led to the [building] .
    a [animal] drank from the pond .
    there were [several] [animals] by the pond .
    the [worker] opened at [several] .
    a [size] [tree] grew near the [landmark] .
    the [landmark] was made of [material] .
    a woman in a [colour] dress went by .
    a man with a [size] cart went by .
    the paint on the [landmark] was [colour] .
    every [season] , [animals] came to the pond .
    in [season] the [tree] had many leaves .
    from the [landmark] one could see the [building] .
    the farmer had [several] [animals] .
    a ship went down the river .
    the [building] was [several] miles from the sea .
    smoke rose from the [building] .
    a [colour] flag flew in the wind .
    the [part] light lay on the [landmark] .
    rain came over the field in [season] .
    a path of [material] led to the [landmark] .
    dry leaves lay under the [tree] .
    the [worker] went by with a [size] cart .
    the [worker] lived near the [building] .
    the [worker] carried [material] to the [building] .
    the [animal] slept under the [tree] .
    a [size] [animal] walked along the [landmark] .
    [several] [animals] crossed the road .
    the [animals] ate by the [landmark] .
    it was a [weather] day in [season] .
    the valley was green and quiet .
    people said that the [building] was [size] .
    the path went past the [landmark] and down to the river .
    on the way there was a [size] [building] and a [colour] [landmark] .
    it took [several] weeks to build the [building] .
    the [worker] painted the [landmark] [colour] .
    near the [building] the road went left .
    the [worker] fed the [animals] in the [part] .
    a [tree] and a [landmark] stood side by side .
    the sea was [colour] that [part] .
    behind the [landmark] lay a [size] field of [crop] .
    the [worker] cut the [crop] in [season] .
    [crop] grew on the sides of the road .
    [several] carts came from the [building] .
    water ran from the [landmark] to the stream .
    a [size] stream ran through the field .
    the clouds were [colour] in the [part] .
    a [colour] [animal] lived behind the [building] .
    the [worker] came by each [part] .
    each [weekday] the [worker] walked to the [building] .
    one could see the [animals] from the [landmark] .
    there was [material] on the cart .
    the ship brought [material] and [crop] .
    """

SENTENCES = {
    "opening": """
        once upon a time there was a [size] {girl} named {A} .
        once there was a {girl} called {A} .
        {A} was a [trait] {girl} who lived near the {place} .
        one [part] {A} went to the {place} .
        {A} lived in a [size] house with {his} [relative] .
        early one [part] , {A} was {in} the {place} .
        this is a tale about {A} , a [trait] {girl} .
        on [weekday] , {A} went to the {place} .
        it was [weekday] , and {A} was {in} the {place} .
        """,
    "pair": """
        {A} and {B} went to the {place} .
        one [part] , {A} and {B} were {in} the {place} .
        then {A} and {B} came to the {place} .
        when {A} and {B} got to the {place} , it was [part] .
        {A} met {B} {in} the {place} .
        {A} and {B} sat {in} the {place} .
        on [weekday] , {A} and {B} walked to the {place} .
        """,
    "lead": """
        something happened to {A} .
        this happened to {A} .
        here is what happened to {A} .
        that [part] something happened to {A} .
        now hear what happened to {A} .
        """,
    "bystander": """
        {A} was there too .
        {A} stood by the [landmark] .
        {A} came along with a {thing} .
        {A} sat near the [landmark] .
        {A} was late that [part] .
        {A} walked past with a [size] {thing} .
        """,
    "give": """
        {B} gave a {thing2} to {A} .
        {B} handed a [colour] {thing2} to {A} .
        {B} passed a {thing2} to {A} .
        {B} showed a [size] {thing2} to {A} .
        soon {B} brought a {thing2} to {A} .
        {B} lent a {thing2} to {A} .
        """,
    "fact": """
        {A} had a {thing} .
        {A} had a [colour] {thing} .
        {A} found a {thing} .
        {A} got a {thing} .
        {A} picked up a [size] {thing} .
        {A} carried a {thing} .
        {A} owned a [colour] {thing} .
        {A} brought a {thing} .
        """,
    "use": """
        {A} played with the {thing} .
        {A} put down the {thing} .
        {A} held up the {thing} .
        {A} went home with the {thing} .
        later {A} cleaned the {thing} .
        soon {A} gave away the {thing} .
        at last {A} came back for the {thing} .
        then {A} showed us the {thing} .
        """,
    "goto": """
        {A} went to the {place} .
        {A} ran to the {place} .
        {A} walked to the {place} .
        {A} stayed {in} the {place} .
        {A} was {in} the {place} .
        """,
    "meet": """
        later {B} found {A} {in} the {place} .
        at last {A} came home from the {place} .
        {A} stayed long {in} the {place} .
        soon {A} left the {place} .
        """,
    "count": """
        {A} had {many} {goods} .
        {A} picked {many} {goods} .
        {A} put {many} {goods} on the table .
        {A} found {many} {goods} near the [landmark] .
        """,
    "more": """
        then {he} got {more} more .
        {B} gave {him} {more} more .
        {he} found {more} more by the [landmark] .
        """,
    "sum": """
        now {A} had {sum} {goods} .
        that made {sum} {goods} in all .
        in the end {he} had {sum} {goods} .
        """,
    "like": """
        {A} liked {colour} best .
        {A} always chose {colour} things .
        the colour {A} liked most was {colour} .
        {A} wore {colour} every day .
        """,
    "choose": """
        there was a {colour2} {thing} and a {colour} one . {A} took the {colour} one .
        there was a {colour} {thing} and a {colour2} one . {A} took the {colour} one .
        {A} could have a {colour} {thing} or a {colour2} one , and took the {colour} one .
        {A} could have a {colour2} {thing} or a {colour} one , and took the {colour} one .
        """,
    "hello": """
        “ hello {B} , ” said {A} .
        “ good [part] {B} , ” said {A} .
        “ how are you {B} ? ” asked {A} .
        """,
    "lost_ask": """
        “ where is my {thing} ? ” asked {A} .
        “ did you see my {thing} ? ” asked {A} .
        “ can you help me find my {thing} ? ” asked {A} .
        """,
    "lost_tell": """
        “ it is {in} the {place} , ” said {B} .
        “ i saw it {in} the {place} , ” said {B} .
        “ look {in} the {place} , ” {B} said .
        """,
    "lost_found": """
        {A} went to the {place} and found the {thing} .
        {A} ran to the {place} , and there was the {thing} .
        """,
    "thanks": """
        “ thank you {B} , ” said {A} .
        “ you are a good friend , ” said {A} .
        “ see you soon {B} , ” said {A} .
        """,
    "have_ask": """
        “ what do you have there ? ” asked {B} .
        “ what is that in your hand , {A} ? ” asked {B} .
        """,
    "have_tell": """
        “ i have a {thing} , ” said {A} .
        “ this is a {thing} , ” said {A} .
        “ my [relative] gave me a {thing} , ” said {A} .
        """,
    "have_see": """
        “ may i see the {thing} ? ” asked {B} .
        “ i like the {thing} , ” said {B} .
        “ that is a fine {thing} , ” said {B} .
        """,
    "colour_ask": """
        “ which colour do you like best ? ” asked {B} .
        “ what is your colour , {A} ? ” asked {B} .
        """,
    "colour_tell": """
        “ i like {colour} best , ” said {A} .
        “ i like {colour} most of all , ” said {A} .
        """,
    "count_ask": "“ how many {goods} do you have ? ” asked {B} .",
    "count_tell": "“ i have {many} {goods} , ” said {A} .",
    "count_more": """
        “ take {more} more , ” said {B} .
        “ i can give you {more} more , ” said {B} .
        """,
    "count_sum": "“ now i have {sum} {goods} , ” said {A} .",
    "day_ask": """
        “ how was your day ? ” asked {B} .
        “ what is it , {A} ? ” asked {B} .
        “ what happened ? ” asked {B} .
        """,
    "ask_who": "question : who has the {thing} ? answer : {A} .",
    "ask_what": "question : what does {A} have ? answer : a {thing} .",
    "ask_have": "question : does {A} have the {asked} ? answer : {yes} .",
    "ask_where": "question : where is {A} ? answer : {in} the {place} .",
    "ask_mood": "question : how does {A} feel ? answer : {mood} .",
    "ask_count": "question : how many {goods} does {A} have ? answer : {sum} .",
    "ask_many": "question : how many {goods} does {A} have ? answer : {many} .",
    "ask_colour": "question : which colour does {A} like best ? answer : {colour} .",
    "list_open": """
        list :
        say these words :
        {A} said :
        """,
    "list_thing": "{thing}",
    "list_name": "{A}",
    "list_place": "{place}",
    "list_colour": "{colour}",
    "list_both": "{A} {thing}",
    "match": "{A} {thing}",
    "list_comma": "{thing} ,",
    "list_end": "and so on .",
    "instruction": """
        tell a tale as if you were {mood} .
        write a tale in which someone is {mood} .
        you feel {mood} . tell a tale .
        """,
    "instruction_flat": """
        tell a tale .
        write a tale about someone .
        you can talk . tell a tale .
        """,
}

GENRE_SHARES = {"story": 38, "dialogue": 14, "question": 22, "list": 12, "instruction": 10, "filler": 4}

PLOTS = {
    "story": """
        4 opening event@A filler*0-4 behaviour@A filler? behaviour@A?
        2 opening event@A filler*2-12 behaviour@A react@A?
        2 opening event@A filler*8-16 behaviour@A react@A?
        2 opening behaviour@A filler*0-3 behaviour@A
        3 lead@A event@A lead@B event@B filler*0-2 behaviour@R behaviour@S
        6 lead@A event@A lead@B event@B react@2*2-4
        6 lead@A event@A lead@B event@B lead@C event@C filler? react@3*3-5
        4 lead@A event@A lead@B event@B lead@C event@C lead@D event@D lead@E event@E react@5*3-6
        2 opening event@A filler*0-2 react@A
        4 pair bystander@C? bystander@D? bystander@E? filler*0-2 give@R filler? give@S?
        3 pair give@R give@S give@R give@S give@S?
        5 fact@A fact@B filler? use@2*2-4
        6 fact@A fact@B fact@C filler*0-1 use@3*3-6
        5 fact@A fact@B fact@C fact@D fact@E use@5*4-8
        4 fact@A fact@B fact@C fact@D fact@E fact@F fact@G fact@H use@8*5-10
        3 goto@A goto@B goto@C filler*0-2 meet@3*2-3
        3 opening count@A filler? more@A sum@A
        4 like@A like@B filler*0-2 choose@2 choose@2
        """,
    "dialogue": """
        4 pair hello@R? lost_ask@A lost_tell@A filler*0-1 lost_found@A thanks@A?
        3 pair hello@R? have_ask@A have_tell@A have_see@A have_ask@B have_tell@B filler*0-2 use@2 use@2 use@2?
        2 hello@A hello@B colour_ask@A colour_tell@A colour_tell@B filler*0-2 choose@2 choose@2
        2 pair hello@R? count_ask@A count_tell@A count_more@A count_sum@A thanks@A
        4 pair hello@R? lead@A event@A day_ask@A behaviour@A thanks@A?
        """,
    "question": """
        6 fact@A fact@B ask_have@R ask_have@S
        6 fact@A fact@B fact@C fact@D ask_have@B ask_have@D ask_have@A ask_have@C
        6 fact@A fact@B fact@C fact@D filler? ask_what@4 ask_have@R ask_who@4 ask_have@C ask_what@4
        4 fact@A fact@B ask_what@2*1-3 ask_have@R ask_have@S
        4 fact@A fact@B fact@C ask_what@3*3-5
        4 fact@A fact@B fact@C fact@D fact@E ask_who@5*2-3 ask_what@5*2-3
        4 goto@A goto@B goto@C goto@D ask_where@4*3-4
        4 lead@A event@A lead@B event@B filler? ask_mood@2*2-3
        4 lead@A event@A lead@B event@B lead@C event@C ask_mood@3*3-4
        2 opening event@A filler*0-3 behaviour@A ask_mood@A
        3 count@A count@B count@C ask_many@3*2-3
        2 count@A more@A ask_count@A
        3 like@A like@B like@C ask_colour@3*2-3
        4 list_open match@A match@B match@C match@D match@4*4-8 ask_what@4
        4 list_open match@A match@B match@C match@D list_end ask_what@4*2-4
        4 fact@A fact@B fact@C fact@D list_open match@4*4-8 ask_what@4
        4 list_open match@A match@B match@2*0-4 list_end ask_have@R ask_have@S
        4 list_open match@A match@B match@C match@D match@4*0-6 list_end ask_have@B ask_have@D ask_have@A ask_have@C
        """,
    "list": """
        2 list_open list_thing@%*12-23 list_end
        2 list_open list_name@%*12-23 list_end
        1 list_open list_place@%*12-23 list_end
        1 list_open list_colour@%*12-23 list_end
        3 list_open list_both@%*12-23 list_end
        1 list_open list_comma@%*12-23 list_end
        """,
    "instruction": """
        5 instruction opening event@A filler*0-3 behaviour@A react@A?
        3 instruction opening filler*1-6 behaviour@A behaviour@A
        2 instruction_flat opening event@A filler*0-3 behaviour@A react@A?
        """,
    "filler": "1 filler*10-18",
}

# Two-candidate items: what is told of the first two persons, a distractor (told of the next ones), and the sentence
# whose last word decides. Alternatives to the two candidates for "agree", where the text offers none.
ITEMS = {
    "ioi": ("pair", "bystander", "give"),
    "recall": ("fact@A fact@B", "fact", "use"),
    "mood": ("lead@A event@A", "lead event", "react"),
    "agree": ("fact@A fact@B", "fact", "ask_have"),
}
AGREE_ALTERNATIVES = "one two three four"
