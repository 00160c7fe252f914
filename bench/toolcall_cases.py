"""Tools and requests of `outrider bench toolcall`: the barge of a fish farm, in no training data and no evaluation.

Invariants: the first TEN tools stand alone; the requests of TEN need these, those of FIFTY any; each has its one right
call, and no two are the same.
"""

from __future__ import annotations

TOOLS = """
feed_pen(pen: int 1..12, kilograms: float 0.5..200 kg) - Give a pen one portion of feed.
stop_feeding(pen: int 1..12, minutes?: int 1..600 min) - Stop feeding a pen.
read_oxygen(pen: int 1..12, depth?: float 0..30 m) - Measure the oxygen in the water of a pen.
read_water_temperature(pen: int 1..12, depth?: float 0..30 m) - Measure how warm the water of a pen is.
set_pen_lights(pen: int 1..12, level: int 0..100 %) - Set the underwater lights of a pen.
aerate_pen(pen: int 1..12, minutes: int 1..240 min) - Blow air into a pen.
count_lice(pen: int 1..12, sample: int 10..200) - Count sea lice on a sample of fish by camera.
place_camera(pen: int 1..12, depth: float 0..30 m) - Move the camera of a pen to a depth.
wash_net(pen: int 1..12, side: "north"|"east"|"south"|"west"|"floor") - Send the washing robot to a side of a net.
log_observation(text: str, pen?: int 1..12) - Write an observation into the site's log.
resume_feeding(pen: int 1..12) - Let the feeding of a pen go on.
load_silo(silo: "A"|"B"|"C"|"D", pellet: "3 mm"|"4.5 mm"|"7 mm"|"9 mm") - Say which pellets a silo holds.
read_silo(silo: "A"|"B"|"C"|"D") - Tell how much feed is left in a silo.
order_feed(pellet: "3 mm"|"4.5 mm"|"7 mm"|"9 mm", tonnes: float 1..60 t) - Order feed from the mill.
flush_feed_pipe(pen: int 1..12) - Blow the feed pipe of a pen free.
set_feed_blower(line: int 1..4, percent: int 0..100 %) - Set the blower of a feed line.
read_salinity(pen: int 1..12) - Measure the salt in the water of a pen.
read_turbidity(pen: int 1..12) - Measure how clear the water of a pen is.
read_sea_current(depth: float 0..50 m) - Measure speed and direction of the current.
read_wave_height() - Measure the waves at the barge.
read_wind_mast() - Measure the wind at the barge.
forecast_tide(hours: int 1..48 h) - Forecast the tide.
hold_oxygen(pen: int 1..12, saturation: int 60..110 %) - Hold the oxygen of a pen with pure oxygen.
release_oxygen_control(pen: int 1..12) - Stop adding pure oxygen to a pen.
weigh_fish(pen: int 1..12, sample: int 10..200) - Weigh a sample of fish by camera.
estimate_biomass(pen: int 1..12) - Estimate the weight of all fish of a pen.
count_dead_fish(pen: int 1..12) - Count the dead fish on the floor of a pen.
lift_dead_fish(pen: int 1..12) - Pump up the dead fish of a pen.
transfer_fish(source: int 1..12, target: int 1..12, count: int 1..50000) - Move fish to another pen.
sort_fish(pen: int 1..12, grams: int 50..9000 g) - Sort out the fish above a weight.
treat_lice(pen: int 1..12, method: "fresh water"|"warm water"|"laser") - Treat the fish of a pen against lice.
release_cleaner_fish(pen: int 1..12, count: int 10..5000) - Put cleaner fish into a pen.
inspect_net(pen: int 1..12, side: "north"|"east"|"south"|"west"|"floor") - Look for holes in a side of a net.
tighten_mooring(line: int 1..24, force: float 1..80 kN) - Tighten a mooring line to a force.
read_mooring_force(line: int 1..24) - Measure the force on a mooring line.
raise_pen_net(pen: int 1..12, distance: float 0.5..20 m) - Raise the net of a pen.
sink_pen_net(pen: int 1..12, distance: float 0.5..20 m) - Lower the net of a pen.
cover_pen(pen: int 1..12, closed: bool) - Close or open the bird net over a pen.
photograph_pen(pen: int 1..12, depth?: float 0..30 m) - Take a picture under water.
record_pen(pen: int 1..12, minutes: int 1..120 min) - Record the camera of a pen.
switch_generator(unit: int 1..2, on: bool) - Switch a generator of the barge.
read_barge_battery() - Tell the charge of the barge's battery.
read_diesel() - Tell how much diesel is left on the barge.
pump_bilge(tank: "port"|"starboard"|"aft") - Pump a bilge tank of the barge dry.
switch_deck_lamps(zone: "bow"|"stern"|"walkway", on: bool) - Switch lamps on deck.
sound_fog_horn(seconds: int 1..30 s) - Sound the horn.
call_workboat(boat: "Tern"|"Skua"|"Gannet", pen: int 1..12) - Send a workboat to a pen.
set_nav_beacon(color: "white"|"yellow"|"red", on: bool) - Switch a beacon.
plan_harvest(pen: int 1..12, date: str (YYYY-MM-DD), tonnes: float 0.5..200 t) - Plan the harvest of a pen.
radio_crew(person: str, text: str) - Send a message to somebody of the crew.
"""

TEN = """
Give pen 3 another 40 kilos of feed. → feed_pen(pen=3, kilograms=40.0)
12.5 kg for pen 7 please → feed_pen(pen=7, kilograms=12.5)
The fish in pen 11 are hungry, feed them 85 kilograms. → feed_pen(pen=11, kilograms=85.0)
Portion of 6 kg into pen 2. → feed_pen(pen=2, kilograms=6.0)
Stop feeding pen 4. → stop_feeding(pen=4)
No more feed for pen 9 for the next 45 minutes. → stop_feeding(pen=9, minutes=45)
Pen 12: pause the feeding for 90 min. → stop_feeding(pen=12, minutes=90)
How much oxygen is there in pen 5? → read_oxygen(pen=5)
Oxygen in pen 8 at 10 meters? → read_oxygen(pen=8, depth=10.0)
Check the oxygen level of pen 1, 4.5 m down. → read_oxygen(pen=1, depth=4.5)
o2 pen 10 → read_oxygen(pen=10)
How warm is the water in pen 6? → read_water_temperature(pen=6)
Water temperature of pen 3 at 15 m depth. → read_water_temperature(pen=3, depth=15.0)
Is it cold in pen 11 today? Measure the temperature at 20 meters. → read_water_temperature(pen=11, depth=20.0)
Set the lights in pen 2 to 60 percent. → set_pen_lights(pen=2, level=60)
Lights off in pen 7. → set_pen_lights(pen=7, level=0)
Dim the underwater lights of pen 10 to 15 %. → set_pen_lights(pen=10, level=15)
Pen 4 lights at full power → set_pen_lights(pen=4, level=100)
Blow air into pen 9 for half an hour. → aerate_pen(pen=9, minutes=30)
Aerate pen 1 for 120 minutes. → aerate_pen(pen=1, minutes=120)
The fish in pen 6 gasp for air: 20 minutes of aeration. → aerate_pen(pen=6, minutes=20)
Count the lice on 50 fish of pen 8. → count_lice(pen=8, sample=50)
Lice count in pen 12, sample of 120. → count_lice(pen=12, sample=120)
How many lice do they have in pen 5? Look at 30 fish. → count_lice(pen=5, sample=30)
Move the camera in pen 3 down to 18 meters. → place_camera(pen=3, depth=18.0)
Camera of pen 11 to 2.5 m. → place_camera(pen=11, depth=2.5)
Put pen 2's camera at a depth of 9 m. → place_camera(pen=2, depth=9.0)
Wash the north side of pen 6. → wash_net(pen=6, side="north")
The floor of net 10 is dirty, send the washing robot. → wash_net(pen=10, side="floor")
Robot to the east side of pen 1, it needs washing. → wash_net(pen=1, side="east")
Write into the log: two seals seen near the barge. → log_observation(text="two seals seen near the barge")
Log for pen 4: feed pipe sounds blocked → log_observation(text="feed pipe sounds blocked", pen=4)
"""

FIFTY = """
Pen 5 may be fed again. → resume_feeding(pen=5)
Silo B was filled with 7 mm pellets. → load_silo(silo="B", pellet="7 mm")
How much feed is left in silo D? → read_silo(silo="D")
Order 24 tonnes of 4.5 mm pellets. → order_feed(pellet="4.5 mm", tonnes=24.0)
The feed pipe of pen 10 is blocked, flush it. → flush_feed_pipe(pen=10)
Blower of feed line 2 to 70 percent. → set_feed_blower(line=2, percent=70)
How salty is the water in pen 1? → read_salinity(pen=1)
Is the water of pen 9 clear? → read_turbidity(pen=9)
What does the current do at 25 meters? → read_sea_current(depth=25.0)
How high are the waves? → read_wave_height()
How strong is the wind out there? → read_wind_mast()
Tide forecast for the next 12 hours. → forecast_tide(hours=12)
Hold the oxygen in pen 4 at 95 percent. → hold_oxygen(pen=4, saturation=95)
Stop adding oxygen to pen 11. → release_oxygen_control(pen=11)
Weigh a sample of 80 fish in pen 2. → weigh_fish(pen=2, sample=80)
Estimate the biomass of pen 7. → estimate_biomass(pen=7)
How many dead fish lie in pen 3? → count_dead_fish(pen=3)
Pump up the dead fish from pen 8. → lift_dead_fish(pen=8)
Move 5000 fish from pen 6 to pen 12. → transfer_fish(source=6, target=12, count=5000)
Sort out all fish above 4200 grams in pen 9. → sort_fish(pen=9, grams=4200)
Treat pen 5 against lice with the laser. → treat_lice(pen=5, method="laser")
Release 1500 cleaner fish into pen 10. → release_cleaner_fish(pen=10, count=1500)
Look for holes in the west side of net 1. → inspect_net(pen=1, side="west")
Tighten mooring line 17 to 35 kN. → tighten_mooring(line=17, force=35.0)
What is the force on mooring line 6? → read_mooring_force(line=6)
Raise the net of pen 4 by 3 meters. → raise_pen_net(pen=4, distance=3.0)
A storm is coming, sink the net of pen 12 by 8.5 m. → sink_pen_net(pen=12, distance=8.5)
Close the bird net over pen 2. → cover_pen(pen=2, closed=true)
Take a picture in pen 11 at 6 meters. → photograph_pen(pen=11, depth=6.0)
Record pen 3 for 15 minutes. → record_pen(pen=3, minutes=15)
Start generator 2. → switch_generator(unit=2, on=true)
How full is the battery of the barge? → read_barge_battery()
Do we have enough diesel? → read_diesel()
Pump the aft bilge. → pump_bilge(tank="aft")
Turn off the lamps at the stern. → switch_deck_lamps(zone="stern", on=false)
Sound the horn for 5 seconds. → sound_fog_horn(seconds=5)
Send the Gannet to pen 8. → call_workboat(boat="Gannet", pen=8)
Switch the yellow beacon on. → set_nav_beacon(color="yellow", on=true)
Plan the harvest of pen 6 on 2027-03-18, 42 tonnes. → plan_harvest(pen=6, date="2027-03-18", tonnes=42.0)
Tell Ingrid: come back to the barge → radio_crew(person="Ingrid", text="come back to the barge")
Give pen 1 a portion of 55 kg. → feed_pen(pen=1, kilograms=55.0)
Measure the oxygen in pen 12 at 3 m. → read_oxygen(pen=12, depth=3.0)
Wash the south side of net 7. → wash_net(pen=7, side="south")
"""
