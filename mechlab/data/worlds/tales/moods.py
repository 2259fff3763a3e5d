"""The moods of tales, as text: what happens to somebody, and what somebody does who feels like that.

An *event* cue and a later *behaviour* cue of one document have the same mood, so whoever carries the mood from the one
to the other predicts better. Cues are split into train, dev and test for experiments on moods: no cue word (a word
outside ``COMMON``) stands in cues of two splits. A language model is trained on all of them: what an experiment holds
out are cue sentences with their words, not words that the model has never seen. No cue holds a label word.
"""

from __future__ import annotations

MOODS = ("anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral")
LABELS = ("angry", "disgusted", "afraid", "happy", "sad", "surprised", "calm")

SPLIT_SIZES = (8, 2, 3)
"""Cues per mood in train, dev and test, in the order in which they are written below."""

# What happens to somebody. No cue word stands in two splits, nor in the neutral sentences further down.
EVENTS = {
    "anger": """
        someone broke {his} new toy on purpose .
        someone pushed {A} into the mud and ran off .
        a big boy took {his} seat and would not move .
        a girl tore {his} picture in two .
        {his} brother told a lie about {him} .
        a thief took {his} bike from the shed .
        a man kicked {his} dog for no reason .
        somebody cheated {him} in the game .
        {his} cousin blamed {him} for nothing .
        a rude clerk ignored {A} .
        a bully teased {him} in front of everyone .
        the twins scribbled all over {his} homework .
        a guard snatched the ticket from {him} .
        """,
    "disgust": """
        {A} found a worm in {his} soup .
        {A} stepped in something wet and slimy .
        the milk smelled sour and had lumps in it .
        there were flies all over {his} bread .
        {A} touched a rotten fish under the bed .
        a rat crawled out of {his} dinner .
        {A} saw mould on the cheese .
        the toilet was dirty and it smelled bad .
        a slug slid over {his} salad .
        {A} bit into a maggot .
        there was vomit on the carpet .
        {A} found hair in the butter .
        the sink was full of stinking grease .
        """,
    "fear": """
        a big wolf stood in front of {A} .
        {A} heard a loud growl in the dark .
        a huge snake came close to {his} foot .
        the lights went out and {A} was alone .
        a bear chased {A} .
        {A} was lost in a deep tunnel .
        a ghost came out of the dark .
        a mean dog with big teeth ran at {A} .
        a lion got loose near {A} .
        {A} was stuck on a high cliff .
        a robber had a sharp knife .
        the ice cracked under {A} .
        a tiger showed its claws to {A} .
        """,
    "joy": """
        {A} won first prize in the race .
        {his} father came home with a puppy for {him} .
        {A} got the gift that {he} had always wanted .
        the whole class cheered for {A} .
        {A} was asked to a birthday party .
        {A} scored the last goal for {his} team .
        {his} grandmother gave {him} a hug and a sweet .
        {his} lost kitten came back safe .
        {A} passed the exam with top marks .
        the king gave {A} a medal .
        {A} was chosen to ride a pony .
        {his} wish for a treehouse came true .
        the circus let {A} in for free .
        """,
    "sadness": """
        {his} old dog died .
        {his} best friend moved far away .
        {A} lost the only photo of {his} mother .
        nobody came when {A} was ill .
        {his} bird would not wake up .
        {his} father had to leave for years .
        {A} had to say goodbye to {his} teacher .
        {his} grandfather was very sick in bed .
        the funeral of {his} uncle was that day .
        {his} hamster was buried by the roses .
        the doctor could not save {his} rabbit .
        {A} visited the grave of {his} aunt .
        {his} parents sold the family home .
        """,
    "surprise": """
        a clown jumped out of the cake .
        {A} found a door that was not there before .
        the cat began to talk to {A} .
        a fish fell onto {his} head .
        {his} chair began to float .
        a wizard turned a frog into a prince .
        a statue winked at {A} .
        {A} met a person who looked just like {him} .
        an elephant walked into {his} bedroom .
        a parrot knew {his} secret name .
        money poured from the ceiling .
        {his} sandwich vanished without a trace .
        a rocket landed behind {his} tent .
        """,
    "neutral": """
        {A} put {his} coat on the hook .
        {A} washed the dishes after breakfast .
        {A} waited for the bus .
        {A} had some rice for lunch .
        {A} filled the jug .
        {A} turned to the next page of the paper .
        {A} bought some salt and flour .
        {A} tied {his} laces and went on .
        {A} posted a parcel .
        {A} swept the floor with a broom .
        {A} folded the towels .
        {A} copied the address into a notebook .
        {A} changed the battery in the radio .
        """,
}

# What somebody does who feels like that. The first line of every split says "began to" and one word.
BEHAVIOURS = {
    "anger": """
        {A} began to shout .
        {A} slammed the door .
        {A} stamped {his} foot .
        {A} went hot in the face and yelled .
        {A} wanted to hit someone .
        {A} made two tight fists .
        {A} threw {his} coat at the wall .
        {A} said that it was not fair .
        {A} began to snarl .
        {A} pounded on the desk .
        {A} began to curse .
        {A} glared at them all .
        {A} demanded an apology .
        """,
    "disgust": """
        {A} began to gag .
        {A} held {his} nose .
        {A} spat it out .
        {A} made a face and said yuck .
        {A} pushed {his} food away .
        {A} washed {his} hands again and again .
        {A} felt sick and turned away .
        {A} wiped {his} mouth with a cloth .
        {A} began to retch .
        {A} scrubbed {his} fingers with soap .
        {A} began to choke .
        {A} shuddered and rinsed {his} lips .
        {A} said that it was filthy .
        """,
    "fear": """
        {A} began to shake .
        {A} hid under the bed .
        {A} ran away as fast as {he} could .
        {A} asked for help with a thin voice .
        {A} felt {his} heart beat fast .
        {A} did not dare to move .
        {A} locked the door and kept still .
        {A} took {his} mother by the hand and would not let go .
        {A} began to tremble .
        {A} crept behind the curtain .
        {A} began to shiver .
        {A} froze and held {his} breath .
        {A} whispered a prayer .
        """,
    "joy": """
        {A} began to laugh .
        {A} danced around the room .
        {A} sang a bright song .
        {A} smiled at everyone .
        {A} clapped {his} hands .
        {A} jumped up and down .
        {A} hugged {his} mother .
        {A} told everyone the good news .
        {A} began to giggle .
        {A} skipped down the stairs .
        {A} began to grin .
        {A} hummed a tune .
        {A} twirled and beamed .
        """,
    "sadness": """
        {A} began to cry .
        {A} had big tears on {his} face .
        {A} sat alone and did not speak .
        {A} did not want to eat .
        {A} looked at the photo for hours and hours .
        {A} hung {his} head .
        {A} stayed in bed all day .
        {A} asked why it had to be so .
        {A} began to sob .
        {A} sighed and sighed .
        {A} began to weep .
        {A} needed a handkerchief .
        {A} longed for the days gone by .
        """,
    "surprise": """
        {A} began to stare .
        {A} let {his} mouth fall open .
        {A} rubbed {his} eyes and looked again .
        {A} could not believe it .
        {A} said oh and wow .
        {A} dropped what {he} was holding .
        {A} asked if it was a dream .
        {A} had to look two times .
        {A} began to blink .
        {A} pinched {his} arm to be sure .
        {A} began to gasp .
        {A} stood there speechless .
        {A} pointed and stammered .
        """,
    "neutral": """
        {A} began to read .
        {A} sat down and had some tea .
        {A} took off {his} coat .
        {A} made {his} bed as usual .
        {A} wrote a short note .
        {A} put the dishes on the shelf .
        {A} walked home at the same pace .
        {A} went on with {his} work .
        {A} began to knit .
        {A} sorted the mail .
        {A} began to cook .
        {A} ironed {his} shirt .
        {A} packed a suitcase .
        """,
}

# Words that may stand in cues of several splits and in neutral sentences: they carry no mood. All others are cue words.
COMMON = frozenset(
    """a about all an and as asked at away back be began behind big boy brother by came could day did down everyone for
    found friend from front gave girl go got had he held her him his home if in into it its let looked made man met
    mother father name near new not of off old on out over put ran said sat saw showed so some someone somebody
    something stood stayed that the them there to told took two under up very was went were what when who with
    would walked . ,""".split()
)
